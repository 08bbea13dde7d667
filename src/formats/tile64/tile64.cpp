// Entry of the tile formats: sizes, checks, dispatch. Which element is where: tiles.h; bytes: the formats' layout.h.
#include <algorithm>
#include <array>
#include <bit>

#include "core/check.h"
#include "dispatch/registry.h"
#include "formats/tile64/data.h"
#include "formats/tile64/implementations.h"
#include "formats/tile64/tiles.h"
#include "formats/tile64/workspace.h"
#include "formats/tile64_f16/layout.h"
#include "formats/tile64_q/layout.h"
#include "prune/rule.h"

namespace kvpack {

namespace {

/// The type of survivors that tiles of 16 bits take from a dense type.
DType half_type_of(DType dtype) { return dtype == DType::kBFloat16 ? DType::kBFloat16 : DType::kFloat16; }

void require_options(const Tile64Options& options) {
  require_prune_rule(options.sparsity, options.rule);
  require(options.channel_scores_batch_stride >= 0, "channel_scores_batch_stride is ",
          options.channel_scores_batch_stride, "; it must be at least 0");
}

/// Outputs may overlap neither the input nor one another.
void require_apart(const TensorView& x, const Tile64& out, const TensorView& used, const TensorView& workspace) {
  struct Named {
    const char* name;
    const TensorView* view;
  };
  const std::array named{Named{"x", &x},
                         Named{"out.bitmaps", &out.bitmaps},
                         Named{"out.offsets", &out.offsets},
                         Named{"out.payload", &out.payload},
                         Named{"out.starts", &out.starts},
                         Named{"out.scales", &out.scales},
                         Named{"out.zeros", &out.zeros},
                         Named{"used", &used},
                         Named{"workspace", &workspace}};
  for (std::size_t i = 0; i < named.size(); ++i) {
    for (std::size_t j = i + 1; j < named.size(); ++j) {
      require(!may_overlap(*named[i].view, *named[j].view), named[i].name, " and ", named[j].name,
              " overlap in memory");
    }
  }
}

/// What a finding says in words, with both values.
std::string describe(const Tile64Finding& finding, const Tile64Data& tiles) {
  const std::string place = text("batch ", finding.batch, ", tile ", finding.tile, ": ");
  switch (finding.fault) {
    case Tile64Fault::kStartNegative:
      return text(place, "starts at ", finding.actual, "; a start or an offset is at least ", finding.expected);
    case Tile64Fault::kOffsetBackwards:
      return text(place, "its offset is ", finding.actual, " but that of the tile before is ", finding.expected);
    case Tile64Fault::kPastTheEnd:
      return text(place, "ends at element ", finding.actual, " of the payload, which has ", finding.expected);
    case Tile64Fault::kCountDisagrees:
      return text(place, "offsets give it ", finding.actual, " elements of the payload; its bitmap takes ",
                  finding.expected);
    case Tile64Fault::kGridNotFinite:
      return text(place, finding.expected == 0 ? "its scale is " : "its zero is ",
                  std::bit_cast<float>(static_cast<std::uint32_t>(finding.actual)), "; it must be finite");
    case Tile64Fault::kZeroNotWhole:
      return text(place, "its zero is ", std::bit_cast<float>(static_cast<std::uint32_t>(finding.actual)),
                  "; it must be a whole number");
    case Tile64Fault::kNone:
      break;
  }
  return text(place, "fault ", static_cast<int>(finding.fault), " in tiles of ", tiles.bits, " bits");
}

}  // namespace

std::int64_t tile64_tiles(std::int64_t tokens, std::int64_t head_dim) {
  constexpr std::int64_t kMostTokens = (std::int64_t{1} << 31) - kTileElements;
  require(head_dim == 64 || head_dim == 128 || head_dim == 256, "head_dim is ", head_dim,
          "; it must be 64, 128 or 256");
  require(tokens >= 0 && tokens <= kMostTokens, "tokens is ", tokens, "; it must be 0 to ", kMostTokens);
  return tile64::blocks_of(tokens) * head_dim;
}

// Let tile t hold n_t survivors, S = sum of n_t <= batches * tokens * kept_per_row (tokens that fill up the last block
// hold none), N = batches * T tiles, of which at most min(N, S) hold any.
//   A tile takes n_t rounded up to its unit u: at most n_t + u - 1 when it holds survivors, 0 when it holds none. So all
//   take at most S + (u - 1) * min(N, S); in codes, u = capacity and a unit is one word, that divided by u.
//   No tile holds more than 64, which bounds the sum by N full tiles.
// Both are bounds, so the smaller one is; the sum is a whole number of units, so the bound may be rounded down to one.
std::int64_t tile64_payload_bound(std::int32_t bits, std::int64_t batches, std::int64_t tokens, std::int64_t head_dim,
                                  std::int64_t kept_per_row) {
  const std::int64_t tiles = batches * tile64::require_size(bits, batches, tokens, head_dim);
  require(kept_per_row >= 0 && kept_per_row <= head_dim, "kept_per_row is ", kept_per_row, "; it must be 0 to ",
          head_dim);
  const std::int64_t survivors = batches * tokens * kept_per_row;
  const std::int64_t holding = std::min(tiles, survivors);
  if (bits == kUnquantizedBits) {
    constexpr std::int64_t kUnit = tile64_f16::kTilePadHalves;
    return std::min(tiles * kTileElements, (survivors + (kUnit - 1) * holding) / kUnit * kUnit);
  }
  const std::int64_t unit = tile64_q::capacity(bits);
  return std::min(tiles * tile64_q::tile_words(kTileElements, bits), (survivors + (unit - 1) * holding) / unit);
}

std::int64_t tile64_workspace_bytes(std::int32_t bits, std::int64_t batches, std::int64_t tokens, std::int64_t head_dim,
                                    DeviceKind device) {
  tile64::require_size(bits, batches, tokens, head_dim);
  return device == DeviceKind::kCpu ? 0 : tile64::compress_workspace_bytes(bits, batches, tokens, head_dim);
}

void compress_tile64(const TensorView& x, const Tile64Options& options, const Tile64& out, const TensorView& workspace,
                     const TensorView& used, void* stream) {
  CompressTile64Problem problem;
  problem.out = tile64::checked_tiles(out, "out");
  const Device device = out.bitmaps.device;
  problem.x = tile64::checked_matrices(x, "x", problem.out, device);
  require_options(options);
  if (out.bits == kUnquantizedBits && out.payload.dtype != half_type_of(x.dtype)) {
    throw InvalidArgument(text("out.payload is ", name_of(out.payload.dtype), " but x is ", name_of(x.dtype),
                               "; expected ", name_of(half_type_of(x.dtype))));
  }
  if (!is_empty(used)) require_exact(used, {"used"}, DType::kInt64, {1}, device);
  require_apart(x, out, used, workspace);
  problem.prunes = options.sparsity > 0.0;
  problem.rank_from_top = rank_from_top(options.sparsity, options.rule, out.head_dim);
  problem.rule = options.rule;
  problem.channel_scores = options.channel_scores;
  problem.channel_scores_batch_stride = options.channel_scores_batch_stride;
  problem.workspace = checked_workspace(
      workspace, tile64_workspace_bytes(out.bits, problem.out.batches, out.tokens, out.head_dim, device.kind), device);
  problem.used = is_empty(used) ? nullptr : static_cast<std::int64_t*>(used.data);
  problem.stream = stream;
  select<CompressTile64Function>(Operation::kCompressTile64, device.kind)(problem);
}

void unpack_tile64(const Tile64& tiles, const TensorView& out, void* stream) {
  UnpackTile64Problem problem;
  problem.tiles = tile64::checked_tiles(tiles, "tiles");
  const Device device = tiles.bitmaps.device;
  problem.out = tile64::checked_matrices(out, "out", problem.tiles, device);
  for (int i = 0; i < out.rank && out.num_elements() > 0; ++i) {
    const auto axis = static_cast<std::size_t>(i);
    if (out.shape[axis] <= 1 || out.strides[axis] > 0 || out.num_elements() == 0) continue;
    throw InvalidArgument(
        text("out has the strides ", text_of(out.strides, out.rank), "; several of its elements would share memory"));
  }
  for (const TensorView* view :
       {&tiles.bitmaps, &tiles.offsets, &tiles.payload, &tiles.starts, &tiles.scales, &tiles.zeros}) {
    require(!may_overlap(*view, out), "out overlaps the tiles in memory");
  }
  problem.stream = stream;
  const auto function = select<UnpackTile64Function>(Operation::kUnpackTile64, device.kind);
  if (out.num_elements() > 0) function(problem);
}

void check_tile64(const Tile64& tiles, void* stream) {
  CheckTile64Problem problem;
  problem.tiles = tile64::checked_tiles(tiles, "tiles");
  problem.stream = stream;
  const auto function = select<CheckTile64Function>(Operation::kCheckTile64, tiles.bitmaps.device.kind);
  const Tile64Finding finding = function(problem);
  if (finding.fault != Tile64Fault::kNone) throw InvalidArgument(describe(finding, problem.tiles));
}

}  // namespace kvpack
