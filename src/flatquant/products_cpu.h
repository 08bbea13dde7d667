// Small products of float32 matrices whose operands stay in cache: a tile of the result lies in registers, lanes are
// neighbouring columns. Compiled once per instruction set, behind elements_cpu.h; without an include guard.
//
//   C[i, j] += A[i, k] * B[k, j]      kTileRows x kTileVectors accumulators; each k takes one broadcast of A for each row and
//                                     one vector of B for each kLanes columns

namespace kvpack::KVPACK_ISA {
namespace {

// As many accumulators as hide the latency of a fused multiply-add and leave registers for the operands.
#if KVPACK_ISA_LANES == 16
inline constexpr int kTileRows = 12;
#elif KVPACK_ISA_LANES == 8
inline constexpr int kTileRows = 6;
#else
inline constexpr int kTileRows = 4;
#endif
inline constexpr int kTileVectors = 2;

/// The operands of one product. A's element [i, k] lies at i*a_row + k*a_depth, so that a transposed matrix is no other case.
struct Product {
  const float* a;
  std::int64_t a_row;
  std::int64_t a_depth;
  const float* b;  // [depth, b_stride]
  std::int64_t b_stride;
  float* c;  // [rows, c_stride]
  std::int64_t c_stride;
  std::int64_t rows;
  std::int64_t depth;
  std::int64_t columns;  // a multiple of kLanes
};

/// Rows [row, row + kRows) and vectors [column, column + kVectors * kLanes) of the result.
template <int kRows, int kVectors>
void multiply_tile(const Product& product, std::int64_t row, std::int64_t column) {
  F32 sums[kRows][kVectors];
  for (auto& of_row : sums) {
    for (F32& sum : of_row) sum = set1(0.0f);
  }
  const float* a = product.a + row * product.a_row;
  const float* b = product.b + column;
  for (std::int64_t k = 0; k < product.depth; ++k) {
    F32 vectors[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) vectors[v] = load(b + v * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const F32 factor = set1(a[i * product.a_row]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[i][v] = fma(factor, vectors[v], sums[i][v]);
    }
    a += product.a_depth;
    b += product.b_stride;
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v)
      store(product.c + (row + i) * product.c_stride + column + v * kLanes, sums[i][v]);
  }
}

using TileFunction = void (*)(const Product&, std::int64_t, std::int64_t);

/// Tiles of 1 .. kTileRows rows.
template <int kVectors, int... kLess>
TileFunction tile_of(std::int64_t rows, std::integer_sequence<int, kLess...>) {
  static constexpr TileFunction kFunctions[] = {multiply_tile<kLess + 1, kVectors>...};
  return kFunctions[rows - 1];
}

/// C = A * B. Rows are shared out evenly, so that no tile is much lower than the others.
inline void multiply(const Product& product) {
  using Rows = std::make_integer_sequence<int, kTileRows>;
  const std::int64_t panels = divide_up(product.rows, kTileRows);
  std::int64_t column = 0;
  const auto multiply_columns = [&]<int kVectors>() {
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      const std::int64_t first = panel * product.rows / panels;
      const std::int64_t end = (panel + 1) * product.rows / panels;
      tile_of<kVectors>(end - first, Rows{})(product, first, column);
    }
    column += kVectors * kLanes;
  };
  while (column + kTileVectors * kLanes <= product.columns) multiply_columns.template operator()<kTileVectors>();
  if (column < product.columns) multiply_columns.template operator()<1>();
}

/// The same, rows shared out to threads.
inline void multiply(const Product& product, std::int64_t parts) {
  if (parts <= 1) return multiply(product);
  auto task = [&](std::int64_t index) {
    const std::int64_t first = index * product.rows / parts;
    Product part = product;
    part.a += first * product.a_row;
    part.c += first * product.c_stride;
    part.rows = (index + 1) * product.rows / parts - first;
    multiply(part);
  };
  parallel_for(parts, task);
}

/// Both matrices of a transform as floats, rows of `right` padded to whole vectors. Valid as long as the call.
struct FloatMatrices {
  const float* left = nullptr;   // [rows, rows]
  const float* right = nullptr;  // [columns, stride]
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t stride = 0;  // columns, padded
  [[nodiscard]] std::int64_t floats() const { return rows * stride; }
};

template <typename T>
inline FloatMatrices widen_matrices(const KronMatrices& matrices) {
  FloatMatrices wide;
  wide.rows = matrices.rows;
  wide.columns = matrices.columns;
  wide.stride = round_up(matrices.columns, kLanes);
  constexpr bool kIsFloat = std::is_same_v<T, float>;
  const std::int64_t left_floats = matrices.left == nullptr || kIsFloat ? 0 : round_up(wide.rows * wide.rows, kLanes);
  const bool keeps_right = kIsFloat && wide.stride == wide.columns;
  const std::int64_t right_floats = matrices.right == nullptr || keeps_right ? 0 : wide.columns * wide.stride;
  float* memory = thread_scratch(left_floats + right_floats + kLanes, Scratch::kCall);
  const T* left = static_cast<const T*>(matrices.left);
  const T* right = static_cast<const T*>(matrices.right);
  if constexpr (kIsFloat) {
    wide.left = left;
    wide.right = right;
  }
  if (left_floats > 0) {
    for (std::int64_t i = 0; i < wide.rows * wide.rows; i += kLanes) {
      store(memory + i, load_some(left + i, wide.rows * wide.rows - i));
    }
    wide.left = memory;
  }
  if (right_floats > 0) {
    float* padded = memory + left_floats;
    for (std::int64_t k = 0; k < wide.columns; ++k) {
      for (std::int64_t j = 0; j < wide.columns; j += kLanes) {
        store(padded + k * wide.stride + j, load_some(right + k * wide.columns + j, wide.columns - j));
      }
    }
    wide.right = padded;
  }
  return wide;
}

/// y [rows, stride] = left^T * x * right of one token; x [rows, x_stride] with zeros behind the columns where it is padded;
/// `half` holds as much as y. Each product is shared out to `parts` threads. Returns where the result is: y, or x itself
/// where there is no matrix.
inline const float* transform_token(const FloatMatrices& matrices, const float* x, std::int64_t x_stride, float* half,
                                    float* y, std::int64_t parts) {
  const float* result = x;
  std::int64_t stride = x_stride;
  if (matrices.left != nullptr) {
    float* target = matrices.right != nullptr ? half : y;
    multiply({matrices.left, 1, matrices.rows, x, x_stride, target, matrices.stride, matrices.rows, matrices.rows,
              matrices.stride},
             parts);
    result = target;
    stride = matrices.stride;
  }
  if (matrices.right != nullptr) {
    multiply({result, stride, 1, matrices.right, matrices.stride, y, matrices.stride, matrices.rows, matrices.columns,
              matrices.stride},
             parts);
    result = y;
  }
  return result;
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
