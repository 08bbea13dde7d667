// Transform-coded rows on the GPU: products (product_wgmma_cuda.cuh on Hopper, product_tensor_cuda.cuh, or
// product_chain_cuda.cuh with the CPU's bits), and
// between them the codec of the rows. Tokens go through in chunks, so that temporary memory stays bounded.
//
//   compress   x -> product -> z [chunk, coefficients] -> pack_tiles_kernel or pack_kernel -> rows
//   unpack     rows -> expand_kernel -> centroids [chunk, coded] -> product -> out, or float32 -> rotate_kernel -> out
//   simulate   x -> product -> z -> quantize_kernel -> centroids in place -> product -> out
//
// For wgmma the codec splits centroids itself, in the memory of a float, so that their product reads what it multiplies.
#include <algorithm>

#include "core/with_type.h"
#include "cuda/buffer.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "formats/klt_rows/codec_launch_cuda.cuh"
#include "klt/implementations.h"
#include "klt/product_chain_cuda.cuh"
#include "klt/product_tensor_cuda.cuh"
#include "klt/product_wgmma_launch_cuda.cuh"

namespace kvpack::cuda {

namespace {

/// Tokens of a chunk: 5 waves of blocks on the largest GPUs for 640 coefficients, and 84 MB of float32.
constexpr std::int64_t kChunkRows = 32768;

enum class Arithmetic : std::int32_t { kChains, kMma, kWgmma };
constexpr Arithmetic kFastest = Arithmetic::kWgmma;  // what the implementation "cuda" takes
/// Whether its synthesis wants centroids as SplitFloat.
constexpr bool wants_split(Arithmetic arithmetic) { return arithmetic == Arithmetic::kWgmma; }

/// wgmma exists on Hopper, where the library holds code for it; elsewhere mma.sync takes its place.
Arithmetic available(Arithmetic wanted) {
#if defined(KVPACK_COMPILES_FOR_SM90A)
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) == 9) return wanted;
#endif
  return wanted == Arithmetic::kWgmma ? Arithmetic::kMma : wanted;
}

/// A matrix on the right side of products, in the form that the arithmetic wants.
class Factors {
 public:
  /// Temporary memory that it needs.
  static std::int64_t bytes(Arithmetic arithmetic, std::int32_t depth, std::int32_t columns) {
    if (arithmetic == Arithmetic::kChains) return 0;
    return arithmetic == Arithmetic::kMma ? tensor::split_bytes(depth, columns) : wgmma::split_bytes(depth, columns);
  }
  Factors(Arithmetic arithmetic, const float* matrix, std::int32_t depth, std::int32_t columns, unsigned char* memory,
          cudaStream_t stream)
      : arithmetic_(arithmetic), matrix_(matrix), depth_(depth), columns_(columns), stream_(stream) {
    if (arithmetic == Arithmetic::kMma) split_ = tensor::launch_split(matrix, depth, columns, memory, stream);
    if (arithmetic == Arithmetic::kWgmma) blocks_ = wgmma::launch_split(matrix, depth, columns, memory, stream);
  }
  template <typename T>
  void multiply(const ProductRows<T>& lhs, const StoreSums& store) const {
    switch (arithmetic_) {
      case Arithmetic::kChains:
        return launch_chain_product<T>(lhs, matrix_, depth_, columns_, store, stream_);
      case Arithmetic::kMma:
        return launch_tensor_product<T>(lhs, split_, depth_, columns_, store, stream_);
      case Arithmetic::kWgmma:
        return launch_wgmma_product<T>(lhs, blocks_, depth_, depth_, columns_, store, stream_);
    }
  }
  /// Multiplies centroids as the codec left them: numbers, or split where wants_split() holds. Zeros behind the depth.
  template <typename Store>
  void multiply_centroids(float* values, std::int64_t pitch, std::int64_t rows, const Store& store) const {
    const KltMatrix matrix{values, DType::kFloat32, 0, pitch, 1};
    const TokenSpan span{0, std::max<std::int64_t>(rows, 1), 0, rows};
    switch (arithmetic_) {
      case Arithmetic::kChains:
        return launch_chain_product<float>({matrix, span}, matrix_, depth_, columns_, store, stream_);
      case Arithmetic::kMma:
        return launch_tensor_product<float>({matrix, span}, split_, depth_, columns_, store, stream_);
      case Arithmetic::kWgmma:
        return launch_wgmma_product<SplitFloat>({matrix, span}, blocks_, depth_, static_cast<std::int32_t>(pitch),
                                                columns_, store, stream_);
    }
  }

 private:
  Arithmetic arithmetic_;
  const float* matrix_;
  std::int32_t depth_;
  std::int32_t columns_;
  tensor::SplitMatrix split_{};
  wgmma::SplitBlocks blocks_{};
  cudaStream_t stream_;
};

/// Copies the protected tokens. A thread per element.
template <typename T>
__global__ void __launch_bounds__(256)
    copy_tokens_kernel(KltMatrix x, KltMatrix out, TokenSpan span, std::int32_t channels) {
  const std::int64_t elements = span.rows * channels;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x; i < elements;
       i += static_cast<std::int64_t>(gridDim.x) * 256) {
    const std::int64_t channel = i % channels;
    token_of<T>(out, span, i / channels)[channel * out.channel_stride] =
        token_of<const T>(x, span, i / channels)[channel * x.channel_stride];
  }
}

/// Rotates heads of float32 tokens and rounds them to out.
///
/// Launch  any number of blocks of 256
/// Work    a thread per channel: its partner is half a width away
/// Reads   dense twice, from the cache the second time; cos and sin from the cache
/// Writes  out once
/// Needs   nothing
template <typename T>
__global__ void __launch_bounds__(256)
    rotate_kernel(const float* dense, KltRopeData rope, KltMatrix out, TokenSpan span, std::int32_t channels) {
  const std::int64_t elements = span.rows * channels;
  const std::int32_t half = rope.width / 2;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x; i < elements;
       i += static_cast<std::int64_t>(gridDim.x) * 256) {
    const std::int64_t row = i / channels;
    const auto channel = static_cast<std::int32_t>(i % channels);
    const std::int32_t place = channel % rope.head_dim;
    const std::int64_t angle = (span.first_token + (span.first_row + row) % span.tokens) * rope.width + place;
    float value = dense[i];
    if (place < half) {
      value = value * rope.cos[angle] + -dense[i + half] * rope.sin[angle];
    } else if (place < rope.width) {
      value = value * rope.cos[angle] + dense[i - half] * rope.sin[angle];
    }
    set_element(value, token_of<T>(out, span, row)[channel * out.channel_stride]);
  }
}

/// Pieces of one allocation: each allocation of a captured graph costs about a microsecond of its replay.
class Reservation {
 public:
  /// Bytes from the allocation's start to a new piece, for any type.
  template <typename T>
  std::int64_t take(std::int64_t count) {
    const std::int64_t first = bytes_;
    bytes_ = round_up(first + count * static_cast<std::int64_t>(sizeof(T)), 256);
    return first;
  }
  [[nodiscard]] std::int64_t bytes() const { return std::max<std::int64_t>(bytes_, 1); }

 private:
  std::int64_t bytes_ = 0;
};

/// What a call needs besides its tensors: descriptions of the coefficients, one chunk's numbers, and what its products need.
class Workplace {
 public:
  /// Bytes that products need, channels of a token in float32 before its rotation, and the form of centroids.
  struct Needs {
    std::int64_t analysis = 0;
    std::int64_t synthesis = 0;
    std::int32_t dense_channels = 0;
    bool splits_centroids = false;
    bool packs_tiles = false;
  };
  /// Floats from a row's coefficients to the next row's.
  static std::int64_t pitch_of(const KltData& table) { return round_up(std::max(table.coefficients, 1), 32); }
  Workplace(const KltData& table, std::int64_t total_rows, const Needs& needs, cudaStream_t stream)
      : plan_(plan_rows(table.layout)),
        pitch_(pitch_of(table)),
        splits_centroids_(needs.splits_centroids),
        chunk_(std::min(std::max<std::int64_t>(total_rows, 1), kChunkRows)),
        coefficients_(reserved_.take<Coefficient>(plan_.layout.coded)),
        units_(reserved_.take<Unit>(plan_.units)),
        boundaries_(reserved_.take<float>(plan_.boundaries)),
        tile_units_(reserved_.take<TileUnit>(needs.packs_tiles ? plan_.units : 0)),
        tile_coefficients_(reserved_.take<std::uint16_t>(needs.packs_tiles ? plan_.pieces : 0)),
        tile_nodes_(reserved_.take<Node>(needs.packs_tiles ? plan_.nodes : 0)),
        packs_tiles_(needs.packs_tiles),
        values_(reserved_.take<float>(chunk_ * pitch_)),
        scales_(reserved_.take<float>(chunk_)),
        dense_(reserved_.take<float>(chunk_ * needs.dense_channels)),
        analysis_(reserved_.take<unsigned char>(needs.analysis)),
        synthesis_(reserved_.take<unsigned char>(needs.synthesis)),
        memory_(reserved_.bytes(), stream) {
    keep_temporary_memory();  // decoding synchronises after every token
    if (plan_.layout.coded == 0) return;
    const auto blocks = static_cast<int>(divide_up(std::max(plan_.layout.coded, plan_.units), rows::kThreads));
    rows::describe_kernel<<<blocks, rows::kThreads, 0, stream>>>(plan_, table.centroids, at<Coefficient>(coefficients_),
                                                                 at<Unit>(units_), at<float>(boundaries_), tiles());
    check_cuda(cudaGetLastError(), "launch the description of coefficients");
  }
  [[nodiscard]] rows::Parts parts(const KltData& table, const KltRowsData& bytes, std::int64_t tokens,
                                  std::int64_t first_row, std::int64_t num_rows) const {
    return {plan_,
            at<Coefficient>(coefficients_),
            at<Unit>(units_),
            at<float>(boundaries_),
            table.centroids,
            table.in_scale,
            table.coefficients,
            at<float>(values_),
            pitch_,
            at<float>(scales_),
            bytes,
            tokens,
            first_row,
            num_rows,
            splits_centroids_,
            tiles()};
  }
  [[nodiscard]] std::int64_t chunk() const { return chunk_; }
  [[nodiscard]] std::int64_t pitch() const { return pitch_; }
  [[nodiscard]] StoreSums sums() const { return {at<float>(values_), pitch_}; }
  [[nodiscard]] unsigned char* analysis() const { return at<unsigned char>(analysis_); }
  [[nodiscard]] unsigned char* synthesis() const { return at<unsigned char>(synthesis_); }
  [[nodiscard]] float* dense() const { return at<float>(dense_); }
  [[nodiscard]] const float* scales() const { return at<float>(scales_); }
  [[nodiscard]] float* values() const { return at<float>(values_); }

 private:
  template <typename T>
  [[nodiscard]] T* at(std::int64_t place) const {
    return reinterpret_cast<T*>(memory_.data() + place);
  }

  /// Null pointers unless tiles are packed.
  [[nodiscard]] rows::TileTables tiles() const {
    if (!packs_tiles_) return {};
    return {at<TileUnit>(tile_units_), at<std::uint16_t>(tile_coefficients_), at<Node>(tile_nodes_),
            static_cast<std::int32_t>(pitch_ / 4)};
  }

  RowPlan plan_;
  std::int64_t pitch_;
  bool splits_centroids_;
  std::int64_t chunk_;
  Reservation reserved_;
  std::int64_t coefficients_;  // places in memory_, as all up to it
  std::int64_t units_;
  std::int64_t boundaries_;
  std::int64_t tile_units_;
  std::int64_t tile_coefficients_;
  std::int64_t tile_nodes_;
  bool packs_tiles_;
  std::int64_t values_;
  std::int64_t scales_;
  std::int64_t dense_;
  std::int64_t analysis_;
  std::int64_t synthesis_;
  DeviceBuffer<unsigned char> memory_;
};

/// Calls body(span) for each chunk of rows.
template <typename Body>
void for_each_chunk(std::int64_t sequences, std::int64_t first_token, std::int64_t tokens, std::int64_t chunk,
                    Body&& body) {
  const std::int64_t total = sequences * tokens;
  for (std::int64_t first = 0; first < total; first += chunk) {
    body(TokenSpan{first_token, tokens, first, std::min(chunk, total - first)});
  }
}

/// The rows' words are read and written as 16 bits.
void require_even(const KltRowsData& bytes) {
  const bool is_even = reinterpret_cast<std::uintptr_t>(bytes.data) % 2 == 0 && bytes.sequence_stride % 2 == 0;
  require(is_even, "rows begin at ", static_cast<const void*>(bytes.data), " with ", bytes.sequence_stride,
          " bytes between sequences; on a GPU both are even");
}

/// Coefficients of a chunk into the workplace.
void analyse(const KltMatrix& x, const TokenSpan& span, const KltData& table, const Factors& analysis,
             const Workplace& place) {
  with_float_type(x.dtype, [&]<typename T>() { analysis.multiply(ProductRows<T>{x, span, table.mean}, place.sums()); });
}

/// Centroids and scales in the workplace into tokens.
void synthesise(const KltData& table, const Factors& synthesis, const Workplace& place, const KltRopeData& rope,
                const KltMatrix& out, const TokenSpan& span, cudaStream_t stream) {
  const auto multiply = [&](const auto& store) {
    synthesis.multiply_centroids(place.values(), place.pitch(), span.rows, store);
  };
  with_float_type(out.dtype, [&]<typename T>() {
    if (rope.width == 0) {
      multiply(StoreTokens<T>{out, span, place.scales(), table.mean});
      return;
    }
    multiply(StoreScaled{place.dense(), table.channels, place.scales(), table.mean});
    const int blocks = grid_blocks(divide_up(span.rows * table.channels, 256));
    rotate_kernel<T><<<blocks, 256, 0, stream>>>(place.dense(), rope, out, span, table.channels);
    check_cuda(cudaGetLastError(), "launch the rotation of keys");
  });
}

void compress(const CompressKltProblem& problem, Arithmetic wanted) {
  const DeviceGuard device(problem.x.data, "x");
  const Arithmetic arithmetic = available(wanted);
  require_even(problem.rows);
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  const KltData& table = problem.table;
  const Workplace place(
      table, problem.sequences * problem.tokens,
      {.analysis = Factors::bytes(arithmetic, table.channels, table.coefficients),
       .packs_tiles = rows::packs_tiles(problem.sequences * problem.tokens, Workplace::pitch_of(table))},
      stream);
  const Factors analysis(arithmetic, table.analysis, table.channels, table.coefficients, place.analysis(), stream);
  for_each_chunk(problem.sequences, 0, problem.tokens, place.chunk(), [&](const TokenSpan& span) {
    analyse(problem.x, span, table, analysis, place);
    rows::launch_pack(place.parts(table, problem.rows, problem.tokens, span.first_row, span.rows), stream);
  });
}

void unpack(const UnpackKltProblem& problem, Arithmetic wanted) {
  const DeviceGuard device(problem.out.data, "out");
  const Arithmetic arithmetic = available(wanted);
  require_even(problem.rows);
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  const KltData& table = problem.table;
  const Workplace place(table, problem.sequences * problem.tokens,
                        {.synthesis = Factors::bytes(arithmetic, table.layout.coded, table.channels),
                         .dense_channels = problem.rope.width > 0 ? table.channels : 0,
                         .splits_centroids = wants_split(arithmetic)},
                        stream);
  const Factors synthesis(arithmetic, table.synthesis, table.layout.coded, table.channels, place.synthesis(), stream);
  for_each_chunk(problem.sequences, 0, problem.tokens, place.chunk(), [&](const TokenSpan& span) {
    rows::launch_expand(place.parts(table, problem.rows, problem.tokens, span.first_row, span.rows), stream);
    synthesise(table, synthesis, place, problem.rope, problem.out, span, stream);
  });
}

void simulate(const SimulateKltProblem& problem, Arithmetic wanted) {
  const DeviceGuard device(problem.x.data, "x");
  const Arithmetic arithmetic = available(wanted);
  const auto stream = static_cast<cudaStream_t>(problem.stream);
  const KltData& table = problem.table;
  const std::int64_t first = problem.protected_tokens;
  const std::int64_t tokens = problem.tokens - first;
  if (first > 0) {
    const TokenSpan span{0, first, 0, problem.sequences * first};
    with_float_type(problem.x.dtype, [&]<typename T>() {
      copy_tokens_kernel<T><<<grid_blocks(divide_up(span.rows * table.channels, 256)), 256, 0, stream>>>(
          problem.x, problem.out, span, table.channels);
      check_cuda(cudaGetLastError(), "launch the copy of protected tokens");
    });
  }
  if (tokens == 0) return;
  const Workplace place(table, problem.sequences * tokens,
                        {.analysis = Factors::bytes(arithmetic, table.channels, table.coefficients),
                         .synthesis = Factors::bytes(arithmetic, table.layout.coded, table.channels),
                         .splits_centroids = wants_split(arithmetic)},
                        stream);
  const Factors analysis(arithmetic, table.analysis, table.channels, table.coefficients, place.analysis(), stream);
  const Factors synthesis(arithmetic, table.synthesis, table.layout.coded, table.channels, place.synthesis(), stream);
  for_each_chunk(problem.sequences, first, tokens, place.chunk(), [&](const TokenSpan& span) {
    analyse(problem.x, span, table, analysis, place);
    rows::launch_quantize(place.parts(table, {}, tokens, span.first_row, span.rows), stream);
    synthesise(table, synthesis, place, {}, problem.out, span, stream);
  });
}

}  // namespace

void compress_klt(const CompressKltProblem& problem) { compress(problem, kFastest); }
void unpack_klt(const UnpackKltProblem& problem) { unpack(problem, kFastest); }
void simulate_klt(const SimulateKltProblem& problem) { simulate(problem, kFastest); }

namespace mma {
void compress_klt(const CompressKltProblem& problem) { compress(problem, Arithmetic::kMma); }
void unpack_klt(const UnpackKltProblem& problem) { unpack(problem, Arithmetic::kMma); }
void simulate_klt(const SimulateKltProblem& problem) { simulate(problem, Arithmetic::kMma); }
}  // namespace mma

namespace chains {
void compress_klt(const CompressKltProblem& problem) { compress(problem, Arithmetic::kChains); }
void unpack_klt(const UnpackKltProblem& problem) { unpack(problem, Arithmetic::kChains); }
void simulate_klt(const SimulateKltProblem& problem) { simulate(problem, Arithmetic::kChains); }
}  // namespace chains

}  // namespace kvpack::cuda
