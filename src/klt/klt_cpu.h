// Transform-coded rows in the SIMD vocabulary. Compiled once per instruction set by klt_cpu.cpp.
//
// A task takes up to kTaskTokens tokens through all stages, so that nothing in between leaves the second-level cache:
//   x -> centred floats -> product with analysis -> r, y = z / r, codes -> bytes of the rows
//   bytes -> codes -> centroids -> product with synthesis -> r * sum + mean -> rotation -> out
#include "formats/klt_rows/codec_cpu.h"
#include "klt/product_cpu.h"

namespace kvpack::KVPACK_ISA {
namespace {

inline constexpr std::int64_t kTaskTokens = 48;
/// From so many tokens on the matrices are copied to panels.
inline constexpr std::int64_t kManyTokens = 32;

/// Distance between tokens in working memory: whole vectors, and never a power of two, whose tokens would meet in few sets
/// of the cache.
inline std::int64_t token_stride(std::int64_t values) { return round_up(values, 32) + 16; }

/// A table as the stages read it, made once per call in this thread's call memory.
struct Prepared {
  const KltData* table = nullptr;
  Panels analysis;
  Panels synthesis;
  const float* in_scale = nullptr;    // [coefficients, rounded up to 32] 1 or 0
  const float* boundaries = nullptr;  // class by class: boundary j of all its coefficients, rounded up to vectors
  const std::uint32_t* first_centroids = nullptr;  // [coded, and a vector]: where a coefficient's codebook begins
  std::uint32_t last_centroid = 0;
  PiecesPlan plan;
};

/// Working memory in floats, handed out piece by piece on cache lines.
class Pieces {
 public:
  explicit Pieces(float* memory) : next_(memory) {}
  float* floats(std::int64_t count) {
    float* piece = next_;
    next_ += round_up(count, 16);
    return piece;
  }
  std::uint8_t* bytes(std::int64_t count) { return reinterpret_cast<std::uint8_t*>(floats(count / 4 + 1)); }

 private:
  float* next_;
};

inline std::int64_t boundaries_floats(const klt_rows::RowLayout& layout) {
  std::int64_t floats = 0;
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    floats += (kKltLevels[i] - 1) * round_up(layout.counts[i], kLanes);
  }
  return floats;
}

inline void fill_boundaries(const KltData& table, float* boundaries, std::uint32_t* first_centroids) {
  std::uint32_t centroid = 0;
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    const std::int32_t levels = kKltLevels[i];
    const std::int64_t stride = round_up(table.layout.counts[i], kLanes);
    for (std::int32_t k = 0; k < table.layout.counts[i]; ++k) {
      *first_centroids++ = centroid;
      const float* codebook = table.centroids + centroid;
      for (std::int32_t j = 0; j + 1 < levels; ++j)
        boundaries[j * stride + k] = klt_boundary(codebook[j], codebook[j + 1]);
      centroid += static_cast<std::uint32_t>(levels);
    }
    for (std::int64_t k = table.layout.counts[i]; k < stride; ++k) {
      for (std::int32_t j = 0; j + 1 < levels; ++j) boundaries[j * stride + k] = 0.0f;
    }
    boundaries += (levels - 1) * stride;
  }
}

/// `wants_analysis`, `wants_synthesis`: which of the two products the call needs.
inline Prepared prepare(const KltData& table, std::int64_t tokens, bool wants_analysis, bool wants_synthesis) {
  const std::int64_t coded = table.layout.coded;
  const std::int64_t flags = round_up(table.coefficients, kKltStrands);
  const std::int64_t rounded = coded + kLanes;
  const std::int64_t analysis = wants_analysis ? panels_floats(table.channels, table.coefficients) : 0;
  const std::int64_t synthesis = wants_synthesis ? panels_floats(coded, table.channels) : 0;
  const std::int64_t boundaries = boundaries_floats(table.layout);
  Pieces pieces(thread_scratch(flags + rounded + analysis + synthesis + boundaries + 5 * 16, Scratch::kCall));
  float* in_scale = pieces.floats(flags);
  auto* first_centroids = reinterpret_cast<std::uint32_t*>(pieces.floats(rounded));
  float* boundary = pieces.floats(boundaries);
  Prepared prepared;
  prepared.table = &table;
  for (std::int64_t k = 0; k < flags; ++k) in_scale[k] = k < table.coefficients && table.in_scale[k] != 0 ? 1.0f : 0.0f;
  fill_boundaries(table, boundary, first_centroids);
  for (std::int64_t k = coded; k < rounded; ++k) first_centroids[k] = 0;
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    prepared.last_centroid += static_cast<std::uint32_t>(table.layout.counts[i] * kKltLevels[i]);
  }
  if (coded > 0) --prepared.last_centroid;
  prepared.plan = plan_pieces(table.layout);
  prepared.in_scale = in_scale;
  prepared.boundaries = boundary;
  prepared.first_centroids = first_centroids;
  const bool copies = tokens >= kManyTokens;
  if (wants_analysis) {
    prepared.analysis =
        make_panels(table.analysis, table.channels, table.coefficients, copies, pieces.floats(analysis));
  }
  if (wants_synthesis) {
    prepared.synthesis = make_panels(table.synthesis, coded, table.channels, copies, pieces.floats(synthesis));
  }
  return prepared;
}

/// x - mean of one token.
template <typename T>
inline void centre_token(const T* x, std::int64_t stride, const float* mean, std::int64_t channels, float* centred) {
  std::int64_t c = 0;
  if (stride == 1) {
    for (; c + kLanes <= channels; c += kLanes) store(centred + c, sub(load(x + c), load(mean + c)));
  }
  for (; c < channels; ++c) centred[c] = to_float(x[c * stride]) - mean[c];
}

/// r of one token's coefficients, as rules.h says.
inline Half scale_of(const float* z, const Prepared& prepared) {
  constexpr int kVectors = kKltStrands / kLanes;
  F32 sums[kVectors];
  for (F32& sum : sums) sum = set1(0.0f);
  const F32 zero = set1(0.0f);
  for (std::int64_t k = 0; k < prepared.table->coefficients; k += kKltStrands) {
    for (int v = 0; v < kVectors; ++v) {
      const F32 value = load(z + k + v * kLanes);
      const Mask counts = gt(load(prepared.in_scale + k + v * kLanes), zero);
      sums[v] = add(sums[v], blend(counts, mul(value, value), zero));
    }
  }
  float strands[kKltStrands];
  for (int v = 0; v < kVectors; ++v) store(strands + v * kLanes, sums[v]);
  Half scale;
  from_float(klt_rms(join_strands(strands), prepared.table->scale_count), scale);
  return Half{static_cast<std::uint16_t>(klt_scale_bits(klt_scale_code(scale.bits)))};
}

/// Finds the codes of one token and gives each vector of them to sink(class, place in the class, place among all, codes). A
/// vector that runs over the end of its class comes before those of the next class.
template <typename Sink>
inline void find_codes(const float* z, Half scale, const Prepared& prepared, Sink&& sink) {
  const F32 inverse = set1(klt_inverse_scale(to_float(scale)));
  const float* boundaries = prepared.boundaries;
  std::int64_t first = 0;
  for (std::int32_t i = 0; i < prepared.plan.num_classes; ++i) {
    const ClassPieces& pieces = prepared.plan.classes[i];
    const std::int64_t stride = round_up(pieces.count, kLanes);
    for (std::int64_t k = 0; k < pieces.count; k += kLanes) {
      const F32 y = mul(load(z + first + k), inverse);
      U32 code = set1_u32(0);
      for (std::int32_t j = 0; j + 1 < pieces.levels; ++j) {
        code = add_one_where(gt(y, load(boundaries + j * stride + k)), code);
      }
      sink(pieces, k, first + k, code);
    }
    first += pieces.count;
    boundaries += (pieces.levels - 1) * stride;
  }
}

/// Codes of one token as pieces.
inline void find_pieces(const float* z, Half scale, const Prepared& prepared, std::uint8_t* bytes) {
  find_codes(z, scale, prepared, [&](const ClassPieces& pieces, std::int64_t k, std::int64_t, U32 code) {
    if (pieces.first_field >= 0) {
      const U32 mask = set1_u32((1u << pieces.low_bits) - 1u);
      store_bytes(bytes + pieces.first_field + k, and_u32(code, mask));
    }
    if (pieces.first_digit >= 0) store_bytes(bytes + pieces.first_digit + k, shift_right(code, pieces.low_bits));
  });
}

/// Centroids of one token's codes; writes up to a vector more. Of the places of a vector that lie beyond their class only
/// those inside the table are looked at.
inline void look_up(const std::uint8_t* bytes, const Prepared& prepared, float* values) {
  const U32 last = set1_u32(prepared.last_centroid);
  std::int64_t first = 0;
  for (std::int32_t i = 0; i < prepared.plan.num_classes; ++i) {
    const ClassPieces& pieces = prepared.plan.classes[i];
    for (std::int64_t k = 0; k < pieces.count; k += kLanes) {
      U32 place = load_u32(prepared.first_centroids + first + k);
      if (pieces.first_field >= 0) place = add_u32(place, load_bytes(bytes + pieces.first_field + k));
      if (pieces.first_digit >= 0) {
        place = add_u32(place, shift_left(load_bytes(bytes + pieces.first_digit + k), pieces.low_bits));
      }
      store(values + first + k, gather(prepared.table->centroids, min_u32(place, last)));
    }
    first += pieces.count;
  }
}

/// mean + r * sum of one token, in place.
inline void finish_token(float scale, const float* mean, std::int64_t channels, float* sums) {
  const F32 factor = set1(scale);
  std::int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) store(sums + c, fma(factor, load(sums + c), load(mean + c)));
  for (; c < channels; ++c) sums[c] = std::fma(scale, sums[c], mean[c]);
}

/// Rotates all heads of one token in place.
inline void rotate_token(const KltRopeData& rope, std::int64_t token, std::int64_t channels, float* x) {
  const std::int64_t half = rope.width / 2;
  const float* cos = rope.cos + token * rope.width;
  const float* sin = rope.sin + token * rope.width;
  const F32 sign = set1(-1.0f);
  for (std::int64_t head = 0; head < channels; head += rope.head_dim) {
    float* low = x + head;
    float* high = low + half;
    std::int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      const F32 a = load(low + i);
      const F32 b = load(high + i);
      // -1 * b is -b to the bit, but for NaN, whose sign is open.
      store(low + i, add(mul(a, load(cos + i)), mul(mul(b, sign), load(sin + i))));
      store(high + i, add(mul(b, load(cos + half + i)), mul(a, load(sin + half + i))));
    }
    for (; i < half; ++i) {
      const float a = low[i];
      const float b = high[i];
      low[i] = a * cos[i] + -b * sin[i];
      high[i] = b * cos[half + i] + a * sin[half + i];
    }
  }
}

template <typename T>
inline void write_token(const float* values, std::int64_t channels, T* out, std::int64_t stride) {
  std::int64_t c = 0;
  if (stride == 1) {
    for (; c + kLanes <= channels; c += kLanes) store(out + c, load(values + c));
  }
  for (; c < channels; ++c) from_float(values[c], out[c * stride]);
}

/// What one task works on: tokens [first, first + count) of one sequence.
struct Share {
  std::int64_t sequence;
  std::int64_t first;
  std::int64_t count;
};

/// Coefficients of a share: z [count, stride], through `centred`.
inline void analyse(const KltMatrix& x, const Share& share, const Prepared& prepared, float* centred,
                    std::int64_t centred_stride, float* z, std::int64_t z_stride) {
  const KltData& table = *prepared.table;
  with_float_type(x.dtype, [&]<typename T>() {
    const T* first = static_cast<const T*>(x.data) + share.sequence * x.sequence_stride + share.first * x.token_stride;
    for (std::int64_t t = 0; t < share.count; ++t) {
      centre_token(first + t * x.token_stride, x.channel_stride, table.mean, table.channels,
                   centred + t * centred_stride);
    }
  });
  multiply_panels(centred, centred_stride, share.count, prepared.analysis, z, z_stride);
}

/// Channels of a share from the centroids of its codes, through `sums`.
inline void synthesise(const float* values, std::int64_t values_stride, const float* scales, const Share& share,
                       const Prepared& prepared, const KltRopeData& rope, float* sums, std::int64_t sums_stride,
                       const KltMatrix& out) {
  const KltData& table = *prepared.table;
  if (table.layout.coded == 0) {
    std::memset(sums, 0, static_cast<std::size_t>(share.count * sums_stride) * sizeof(float));
  }
  multiply_panels(values, values_stride, share.count, prepared.synthesis, sums, sums_stride);
  with_float_type(out.dtype, [&]<typename T>() {
    T* first = static_cast<T*>(out.data) + share.sequence * out.sequence_stride + share.first * out.token_stride;
    for (std::int64_t t = 0; t < share.count; ++t) {
      float* token = sums + t * sums_stride;
      finish_token(scales[t], table.mean, table.channels, token);
      if (rope.width > 0) rotate_token(rope, share.first + t, table.channels, token);
      write_token(token, table.channels, first + t * out.token_stride, out.channel_stride);
    }
  });
}

/// Cuts the tokens [first, tokens) of all sequences into shares and runs them.
template <typename Body>
void for_each_share(std::int64_t sequences, std::int64_t first, std::int64_t tokens, Body&& body) {
  const std::int64_t blocks = divide_up(tokens - first, kTaskTokens);
  if (blocks <= 0) return;
  auto task = [&](std::int64_t index) {
    const std::int64_t begin = first + index % blocks * kTaskTokens;
    body(Share{index / blocks, begin, tokens - begin < kTaskTokens ? tokens - begin : kTaskTokens});
  };
  parallel_for(sequences * blocks, task);
}

/// Memory of a task: dense tokens, coefficients or centroids, scales (0 until written), bytes. Nothing of it is an array on
/// the stack: built by GCC 12 with AddressSanitizer, AVX-512 code that cleared one was seen to fault.
struct TaskMemory {
  TaskMemory(const KltData& table, const PiecesPlan& plan)
      : dense_stride(token_stride(table.channels)), coefficients_stride(token_stride(table.coefficients)) {
    const std::int64_t row_bytes = table.layout.row_bytes + kRowRoom;
    Pieces pieces(
        thread_scratch(kTaskTokens * (dense_stride + coefficients_stride + 1) + plan.bytes + row_bytes + 6 * 16));
    dense = pieces.floats(kTaskTokens * dense_stride);
    coefficients = pieces.floats(kTaskTokens * coefficients_stride);
    scales = pieces.floats(kTaskTokens);
    std::fill_n(scales, kTaskTokens, 0.0f);
    codes = pieces.bytes(plan.bytes);
    std::memset(codes, 0, static_cast<std::size_t>(plan.bytes));  // vectors look at a few bytes behind a section
    row = pieces.bytes(row_bytes);
  }
  std::int64_t dense_stride;
  std::int64_t coefficients_stride;
  float* dense;
  float* coefficients;
  float* scales;
  std::uint8_t* codes;  // pieces
  std::uint8_t* row;
};

}  // namespace

void compress_klt(const CompressKltProblem& problem) {
  const Prepared prepared = prepare(problem.table, problem.sequences * problem.tokens, true, false);
  const klt_rows::RowLayout& layout = problem.table.layout;
  for_each_share(problem.sequences, 0, problem.tokens, [&](const Share& share) {
    const TaskMemory memory(problem.table, prepared.plan);
    analyse(problem.x, share, prepared, memory.dense, memory.dense_stride, memory.coefficients,
            memory.coefficients_stride);
    std::uint8_t* row =
        problem.rows.data + share.sequence * problem.rows.sequence_stride + share.first * layout.row_bytes;
    for (std::int64_t t = 0; t < share.count; ++t, row += layout.row_bytes) {
      const float* z = memory.coefficients + t * memory.coefficients_stride;
      const Half scale = scale_of(z, prepared);
      find_pieces(z, scale, prepared, memory.codes);
      pack_row(layout, prepared.plan, scale, memory.codes, memory.row);
      std::memcpy(row, memory.row, static_cast<std::size_t>(layout.row_bytes));
    }
  });
}

void unpack_klt(const UnpackKltProblem& problem) {
  const Prepared prepared = prepare(problem.table, problem.sequences * problem.tokens, false, true);
  const klt_rows::RowLayout& layout = problem.table.layout;
  for_each_share(problem.sequences, 0, problem.tokens, [&](const Share& share) {
    const TaskMemory memory(problem.table, prepared.plan);
    const std::uint8_t* row =
        problem.rows.data + share.sequence * problem.rows.sequence_stride + share.first * layout.row_bytes;
    std::memset(memory.row, 0, static_cast<std::size_t>(layout.row_bytes + kRowRoom));
    for (std::int64_t t = 0; t < share.count && layout.coded > 0; ++t, row += layout.row_bytes) {
      std::memcpy(memory.row, row, static_cast<std::size_t>(layout.row_bytes));
      memory.scales[t] = to_float(unpack_row(layout, prepared.plan, memory.row, memory.codes));
      look_up(memory.codes, prepared, memory.coefficients + t * memory.coefficients_stride);
    }
    synthesise(memory.coefficients, memory.coefficients_stride, memory.scales, share, prepared, problem.rope,
               memory.dense, memory.dense_stride, problem.out);
  });
}

void simulate_klt(const SimulateKltProblem& problem) {
  const std::int64_t tokens = problem.sequences * (problem.tokens - problem.protected_tokens);
  const Prepared prepared = prepare(problem.table, tokens, true, true);
  for_each_share(problem.sequences, problem.protected_tokens, problem.tokens, [&](const Share& share) {
    const TaskMemory memory(problem.table, prepared.plan);
    analyse(problem.x, share, prepared, memory.dense, memory.dense_stride, memory.coefficients,
            memory.coefficients_stride);
    for (std::int64_t t = 0; t < share.count && problem.table.layout.coded > 0; ++t) {
      float* z = memory.coefficients + t * memory.coefficients_stride;
      const Half scale = scale_of(z, prepared);
      memory.scales[t] = to_float(scale);
      find_pieces(z, scale, prepared, memory.codes);
      look_up(memory.codes, prepared, z);
    }
    synthesise(memory.coefficients, memory.coefficients_stride, memory.scales, share, prepared, {}, memory.dense,
               memory.dense_stride, problem.out);
  });
}

}  // namespace kvpack::KVPACK_ISA
