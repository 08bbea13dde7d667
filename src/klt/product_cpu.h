// The product of both directions, sums[t, j] = chain over i of fma(lhs[t, i], rhs[i, j]), in the SIMD vocabulary: lanes are
// neighbouring columns j, and a block of tokens times columns waits in registers while i goes by. A chain that is cut goes on
// from the stored sums, so blocks change no bit (docs/decisions/0007-products-of-klt.md).
//
//   rhs in panels of kPanelVectors vectors of columns          one step i: kTokens x kPanelVectors fused multiply-adds
//   | panel 0: row 0, row 1, ... | panel 1: ... |              for kPanelVectors loads and kTokens broadcasts

namespace kvpack::KVPACK_ISA {
namespace {

/// Tokens and vectors of a register block: 24 sums of 32 registers, 12 of 16, and 4 where a register is a float.
inline constexpr int kBlockTokens = KVPACK_ISA_LANES == 1 ? 2 : 6;
inline constexpr int kPanelVectors = KVPACK_ISA_LANES == 16 ? 4 : 2;
inline constexpr std::int64_t kPanelWidth = kPanelVectors * kLanes;

/// Rows of a panel that stay in the first-level cache while all tokens of a task go by: at most 32 KiB.
inline constexpr std::int64_t kDepthBlock = 128;

/// One register block over rows [0, depth) of a panel.
template <int kTokens, int kVectors>
inline void multiply_block(const float* lhs, std::int64_t lhs_stride, const float* rhs, std::int64_t rhs_stride,
                           std::int64_t depth, bool starts, float* sums, std::int64_t sums_stride) {
  F32 block[kTokens][kVectors];
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) block[t][v] = starts ? set1(0.0f) : load(sums + t * sums_stride + v * kLanes);
  }
  for (std::int64_t i = 0; i < depth; ++i) {
    F32 row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(rhs + i * rhs_stride + v * kLanes);
    for (int t = 0; t < kTokens; ++t) {
      const F32 factor = set1(lhs[t * lhs_stride + i]);
      for (int v = 0; v < kVectors; ++v) block[t][v] = fma(factor, row[v], block[t][v]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) store(sums + t * sums_stride + v * kLanes, block[t][v]);
  }
}

/// All tokens, in blocks; those that are left over make one smaller block, since each block reads the whole panel.
template <int kTokens, int kVectors>
inline void multiply_blocks(const float* lhs, std::int64_t lhs_stride, std::int64_t tokens, const float* rhs,
                            std::int64_t rhs_stride, std::int64_t depth, bool starts, float* sums,
                            std::int64_t sums_stride) {
  std::int64_t t = 0;
  for (; t + kTokens <= tokens; t += kTokens) {
    multiply_block<kTokens, kVectors>(lhs + t * lhs_stride, lhs_stride, rhs, rhs_stride, depth, starts,
                                      sums + t * sums_stride, sums_stride);
  }
  if constexpr (kTokens > 1) {
    if (t == tokens) return;
    multiply_blocks<kTokens - 1, kVectors>(lhs + t * lhs_stride, lhs_stride, tokens - t, rhs, rhs_stride, depth, starts,
                                           sums + t * sums_stride, sums_stride);
  }
}

/// The right side of a product: panel p begins at first + p * panel_stride, its rows `row_stride` apart; the last one at
/// `last`, its columns filled up to whole vectors with zeros.
struct Panels {
  const float* first = nullptr;
  std::int64_t panel_stride = 0;
  std::int64_t row_stride = 0;
  const float* last = nullptr;
  std::int64_t count = 0;
  int last_vectors = 0;
  std::int64_t depth = 0;
};

/// sums [tokens, columns rounded up to vectors] = lhs [tokens, depth] times the panels.
inline void multiply_panels(const float* lhs, std::int64_t lhs_stride, std::int64_t tokens, const Panels& rhs,
                            float* sums, std::int64_t sums_stride) {
  for (std::int64_t p = 0; p < rhs.count; ++p) {
    const bool is_last = p + 1 == rhs.count;
    const float* panel = is_last ? rhs.last : rhs.first + p * rhs.panel_stride;
    const std::int64_t row_stride = is_last ? rhs.last_vectors * kLanes : rhs.row_stride;
    float* target = sums + p * kPanelWidth;
    for (std::int64_t i = 0; i < rhs.depth; i += kDepthBlock) {
      const std::int64_t depth = rhs.depth - i < kDepthBlock ? rhs.depth - i : kDepthBlock;
      const float* rows = panel + i * row_stride;
      const auto run = [&]<int kVectors>() {
        multiply_blocks<kBlockTokens, kVectors>(lhs + i, lhs_stride, tokens, rows, row_stride, depth, i == 0, target,
                                                sums_stride);
      };
      switch (is_last ? rhs.last_vectors : kPanelVectors) {
        case 1:
          run.template operator()<1>();
          break;
        case 2:
          run.template operator()<2>();
          break;
#if KVPACK_ISA_LANES == 16
        case 3:
          run.template operator()<3>();
          break;
        case 4:
          run.template operator()<4>();
          break;
#endif
        default:
          break;
      }
    }
  }
}

/// Floats that pack_panels needs.
inline std::int64_t panels_floats(std::int64_t depth, std::int64_t columns) {
  return depth * round_up(columns, kLanes);
}

/// Columns [first, first + width) of a matrix [depth, columns] as one panel; columns beyond the end are 0.
inline void pack_panel(const float* matrix, std::int64_t depth, std::int64_t columns, std::int64_t first,
                       std::int64_t width, float* panel) {
  const std::int64_t real = columns - first < width ? columns - first : width;
  for (std::int64_t i = 0; i < depth; ++i) {
    const float* row = matrix + i * columns + first;
    for (std::int64_t j = 0; j < real; ++j) panel[i * width + j] = row[j];
    for (std::int64_t j = real; j < width; ++j) panel[i * width + j] = 0.0f;
  }
}

/// Panels of a matrix [depth, columns], copied to `memory` where many tokens will read them; few tokens read the matrix
/// itself, and only its last columns are copied.
inline Panels make_panels(const float* matrix, std::int64_t depth, std::int64_t columns, bool copies, float* memory) {
  Panels panels;
  panels.depth = depth;
  panels.count = divide_up(columns, kPanelWidth);
  if (panels.count == 0) return panels;
  const std::int64_t last_first = (panels.count - 1) * kPanelWidth;
  panels.last_vectors = static_cast<int>(divide_up(columns - last_first, kLanes));
  const std::int64_t last_width = panels.last_vectors * kLanes;
  if (copies) {
    auto task = [&](std::int64_t p) {
      const bool is_last = p + 1 == panels.count;
      pack_panel(matrix, depth, columns, p * kPanelWidth, is_last ? last_width : kPanelWidth,
                 memory + p * depth * kPanelWidth);
    };
    constexpr std::int64_t kTaskFloats = 1 << 17;  // worth waking another thread
    if (depth * columns >= kTaskFloats) {
      parallel_for(panels.count, task);
    } else {
      for (std::int64_t p = 0; p < panels.count; ++p) task(p);
    }
    panels.first = memory;
    panels.panel_stride = depth * kPanelWidth;
    panels.row_stride = kPanelWidth;
    panels.last = memory + (panels.count - 1) * panels.panel_stride;
    return panels;
  }
  pack_panel(matrix, depth, columns, last_first, last_width, memory);
  panels.first = matrix;
  panels.panel_stride = kPanelWidth;
  panels.row_stride = columns;
  panels.last = memory;
  return panels;
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
