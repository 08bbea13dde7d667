// Per channel, tasks and writing; what is known of a tile before comes from quantize/uniform_tile_cpu.h. A task takes a tile
// of channels and sweeps its tokens. One lane owns one channel, so statistics need no shuffles. Rows of a tile are long,
// and a sweep goes through them a few rows at a time, so that memory is read almost in order: narrow tiles of a
// power-of-two stride fall into few cache sets (benches/bench_quantizers.py: 64 channels a tile reach 39 % of the copy
// rate at [2048, 1024], 512 reach more than 60 %).
//
//   channels ->  c0 .. c31 | c32 .. c63 | ...
//   token 0      x x ... x | x x ... x        sweep 1: extremes per run of tokens (one run without outliers)
//   ...          (kRows)   | (kRows)          sweep 2: with outliers only, the elements beyond each channel's pivots
//   token 8      x x ... x | x x ... x        sweep 3: quantise and write

namespace kvpack::KVPACK_ISA {
namespace {

/// Per-channel parameters of a tile, [channels] each; the last two are read only where outliers are kept.
struct TileParams {
  const float* qs;
  const float* offset;
  const float* inverse;  // 1 / qs, 0 for a degenerate grid
  const float* upper;
  const float* lower;
};

/// Sweep 3 for float64, whose exact elements must not go through float32.
template <Outliers kOutliers>
inline void write_tile_elements(const Tile<double>& tile, const TileParams& params, const UniformProblem& problem) {
  for (std::int64_t t = 0; t < tile.tokens; ++t) {
    const double* x = tile.x + t * tile.x_stride;
    double* out = tile.out + t * tile.out_stride;
    for (std::int64_t c = 0; c < tile.channels; ++c) {
      const float upper = kOutliers == Outliers::kKept ? params.upper[c] : 0.0f;
      const float lower = kOutliers == Outliers::kKept ? params.lower[c] : 0.0f;
      out[c] = simulate_element<kOutliers>(x[c], UniformGrid{params.qs[c], params.offset[c]}, upper, lower, problem);
    }
  }
}

/// Sweep 3: quantises, dequantises and writes a tile, whole rows one after another. Going down a few rows first, as the
/// sweeps before do, is slower here: rows of 4 KiB make every load wait for the store before it, whose address differs
/// in the upper bits only.
template <Outliers kOutliers, Steps kSteps, typename T>
inline void write_tile(const Tile<T>& tile, const TileParams& params, const UniformProblem& problem) {
  const RuleLanes rule = make_rule(problem);
  const T* x = tile.x;
  T* out = tile.out;
  for (std::int64_t t = 0; t < tile.tokens; ++t, x += tile.x_stride, out += tile.out_stride) {
    for (std::int64_t c = 0; c < tile.channels; c += kLanes) {
      const F32 qs = load(params.qs + c);
      const GridLanes grid{qs, load(params.offset + c), kSteps == Steps::kReciprocal ? load(params.inverse + c) : qs};
      const F32 upper = kOutliers == Outliers::kKept ? load(params.upper + c) : grid.qs;
      const F32 lower = kOutliers == Outliers::kKept ? load(params.lower + c) : grid.qs;
      store(out + c, simulate_lanes<kOutliers, kSteps>(load(x + c), grid, upper, lower, rule));
    }
  }
}

/// Sweep 3 of any type.
template <Outliers kOutliers, typename T>
inline void write(const Tile<T>& tile, const TileParams& params, const UniformProblem& problem) {
  if constexpr (std::is_same_v<T, double>) {
    write_tile_elements<kOutliers>(tile, params, problem);
  } else if (problem.codebook != nullptr) {
    write_tile<kOutliers, Steps::kCodebook>(tile, params, problem);
  } else {
    bool all_suit = true;
    for (std::int64_t c = 0; c < tile.channels; ++c) all_suit &= suits_reciprocal(params.qs[c], params.offset[c]);
    if (all_suit) {
      write_tile<kOutliers, Steps::kReciprocal>(tile, params, problem);
    } else {
      write_tile<kOutliers, Steps::kDivision>(tile, params, problem);
    }
  }
}

/// What one tile needs to be written, [channels] each.
struct TileGrids {
  float qs[kMaxTileChannels];
  float offset[kMaxTileChannels];
  float inverse[kMaxTileChannels];
  float upper[kMaxTileChannels];
  float lower[kMaxTileChannels];
};

/// Thresholds of a tile's channels, and ranges of what lies between them. Returns false when a value is not finite.
template <int kWidth, typename T>
inline bool find_thresholds(const Tile<T>& tile, const UniformProblem& problem, TileGrids& grids,
                            std::int64_t& outliers) {
  if (problem.static_grids != nullptr) {
    if (!find_extremes<kWidth>(tile, 1, grids.qs, grids.offset)) return false;
    for (std::int64_t c = 0; c < tile.channels; ++c) {
      grids.upper[c] = problem.static_grids[tile.first_channel + c].upper;
      grids.lower[c] = problem.static_grids[tile.first_channel + c].lower;
    }
    outliers += count_tile_outliers(tile, grids.upper, grids.lower);
    return true;
  }
  OutlierSplit splits[kMaxTileChannels];
  const OutlierPlan plan = make_outlier_plan(problem.options.outlier_fraction, tile.tokens);
  if (!split_tile<kWidth>(tile, plan, splits)) return false;
  for (std::int64_t c = 0; c < tile.channels; ++c) {
    grids.qs[c] = splits[c].low;
    grids.offset[c] = splits[c].high;
    grids.upper[c] = splits[c].upper;
    grids.lower[c] = splits[c].lower;
    outliers += splits[c].outliers;
  }
  return true;
}

/// All sweeps over one tile. Returns false, and writes nothing, when a value is not finite.
template <Outliers kOutliers, int kWidth, typename T>
bool simulate_tile(const Tile<T>& tile, const UniformProblem& problem, UniformCounts& counts) {
  TileGrids grids;
  if constexpr (kOutliers == Outliers::kKept) {
    if (!find_thresholds<kWidth>(tile, problem, grids, counts.outliers)) return false;
  } else if (!find_extremes<kWidth>(tile, 1, grids.qs, grids.offset)) {
    return false;
  }
  if (problem.options.scale == ScaleRule::kRms) {
    make_rms_grids(tile, grids.qs, grids.offset);
  } else {
    make_grids(grids.qs, grids.offset, grids.inverse, tile.channels, tile.first_channel, problem);
  }
  write<kOutliers>(tile, TileParams{grids.qs, grids.offset, grids.inverse, grids.upper, grids.lower}, problem);
  counts.vectors += tile.channels;
  counts.quantized += tile.channels * tile.tokens;
  return true;
}

/// Rows [first, end) of a tile.
template <typename T>
inline Tile<T> rows_of(const Tile<T>& tile, std::int64_t first, std::int64_t end) {
  Tile<T> rows = tile;
  rows.x += first * tile.x_stride;
  rows.out += first * tile.out_stride;
  rows.tokens = (end < tile.tokens ? end : tile.tokens) - first;
  return rows;
}

/// One long group without outliers: threads share it by tokens, in two steps, so that each reads whole rows in order.
/// By channels, 2048 tokens of 1024 channels took 0.72 ms on two cores, half of it waiting for memory
/// (benches/bench_quantizers.py). Returns how many channels it did; the rest do not fill a register.
template <typename T>
std::int64_t simulate_long_group(const UniformProblem& problem, TokenRange range, UniformCounts& counts,
                                 bool& all_finite) {
  const std::int64_t channels = problem.channels / kLanes * kLanes;
  if (channels == 0 || range.first == range.end) return channels;
  const Tile<T> tile{static_cast<const T*>(problem.x) + range.first * problem.x_token_stride,
                     static_cast<T*>(problem.out) + range.first * problem.out_token_stride,
                     problem.x_token_stride,
                     problem.out_token_stride,
                     range.end - range.first,
                     channels,
                     0};
  const std::int64_t chunk = (tile.tokens / num_threads() / kRows + 1) * kRows;
  const std::int64_t chunks = divide_up(tile.tokens, chunk);
  float* lows = thread_scratch((2 * chunks + 1) * channels);
  float* highs = lows + chunks * channels;
  float* inverse = highs + chunks * channels;
  std::atomic<bool> finite{true};
  auto find_ranges = [&](std::int64_t i) {
    const Tile<T> rows = rows_of(tile, i * chunk, (i + 1) * chunk);
    if (!find_extremes<1>(rows, 1, lows + i * channels, highs + i * channels)) finite.store(false);
  };
  parallel_for(chunks, find_ranges);
  all_finite = finite.load();
  if (!all_finite) return channels;
  for (std::int64_t i = 1; i < chunks; ++i) {
    for (std::int64_t c = 0; c < channels; c += kLanes) {
      store(lows + c, min(load(lows + i * channels + c), load(lows + c)));
      store(highs + c, max(load(highs + i * channels + c), load(highs + c)));
    }
  }
  make_grids(lows, highs, inverse, channels, 0, problem);
  auto write_rows = [&](std::int64_t i) {
    write<Outliers::kNone>(rows_of(tile, i * chunk, (i + 1) * chunk),
                           TileParams{lows, highs, inverse, nullptr, nullptr}, problem);
  };
  parallel_for(chunks, write_rows);
  counts.vectors += channels;
  counts.quantized += channels * tile.tokens;
  return channels;
}

/// Channels [first, end), at most kMaxTileChannels, of one group of tokens: in pairs of registers, then single ones.
/// Returns how many channels it did; the rest do not fill a register. `all_finite` is cleared, and the tile not
/// written, where a value is not finite.
template <Outliers kOutliers, typename T>
std::int64_t simulate_channels(const UniformProblem& problem, TokenRange range, std::int64_t first, std::int64_t end,
                               UniformCounts& counts, bool& all_finite) {
  constexpr int kWidth = 2;
  std::int64_t c = first;
  const auto run_tile = [&]<int kTileWidth>() {
    const std::int64_t channels = (end - c) / (kTileWidth * kLanes) * (kTileWidth * kLanes);
    if (channels == 0) return;
    const Tile<T> tile{static_cast<const T*>(problem.x) + range.first * problem.x_token_stride + c,
                       static_cast<T*>(problem.out) + range.first * problem.out_token_stride + c,
                       problem.x_token_stride,
                       problem.out_token_stride,
                       range.end - range.first,
                       channels,
                       c};
    all_finite &= simulate_tile<kOutliers, kTileWidth>(tile, problem, counts);
    c += channels;
  };
  run_tile.template operator()<kWidth>();
  run_tile.template operator()<1>();
  return c - first;
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
