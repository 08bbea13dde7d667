// Entries of what reads codes and of the way back: dequantize_int4, undo_transform, linear_w4a4; and the choice of sides.
#include <cmath>

#include "dispatch/registry.h"
#include "flatquant/checks.h"
#include "flatquant/workspace.h"

namespace kvpack {

namespace {

/// Longest row whose sum of products fits int32: 15 * 8 * 2^22 < 2^31.
constexpr std::int64_t kLongestRow = std::int64_t{1} << 22;

void require_out_type(const TensorView& out) {
  const bool is_known = out.dtype == DType::kFloat16 || out.dtype == DType::kBFloat16 || out.dtype == DType::kFloat32;
  require(is_known, "out is ", name_of(out.dtype), "; expected float16, bfloat16 or float32");
}

std::int64_t whole_root(std::int64_t n) {
  auto root = static_cast<std::int64_t>(std::sqrt(static_cast<double>(n)));
  while (root * root > n) --root;
  while ((root + 1) * (root + 1) <= n) ++root;
  return root;
}

}  // namespace

void dequantize_int4(const Int4Rows& rows, const TensorView& out, void* stream) {
  DequantizeInt4Problem problem;
  problem.rows = checked_rows(rows, "rows", rows.codes.device);
  require_out_type(out);
  require_exact(out, {"out"}, out.dtype, {problem.rows.rows, problem.rows.columns}, rows.codes.device);
  require_apart(out, "out", rows, "rows");
  problem.out = out.data;
  problem.dtype = out.dtype;
  problem.stream = stream;
  const auto function = select<DequantizeInt4Function>(Operation::kDequantizeInt4, out.device.kind);
  if (problem.rows.rows > 0) function(problem);
}

void undo_transform(const TensorView& y, const KronTransform& inverse, const TensorView& out, void* stream) {
  require_token_rows(y, "y");
  require_token_rows(out, "out");
  require(y.shape == out.shape, "y has shape ", shape_text(y), " but out has ", shape_text(out));
  require(y.dtype == out.dtype, "y is ", name_of(y.dtype), " but out is ", name_of(out.dtype));
  require(y.device == out.device, "y is on ", device_text(y.device), " but out is on ", device_text(out.device));
  require(y.shape[0] < 2 || out.strides[0] >= y.shape[1], "out has the strides ", text_of(out.strides, out.rank),
          "; its rows of ", y.shape[1], " would share memory");
  UndoTransformProblem problem;
  problem.matrices = checked_matrices(inverse, y.shape[1], y.dtype, y.device);
  require(!may_overlap(y, out), "y and out overlap in memory");
  require_apart(out, "out", inverse);
  problem.y = y.data;
  problem.out = out.data;
  problem.dtype = y.dtype;
  problem.tokens = y.shape[0];
  problem.y_stride = y.strides[0];
  problem.out_stride = out.strides[0];
  problem.stream = stream;
  const auto function = select<UndoTransformFunction>(Operation::kUndoTransform, y.device.kind);
  if (problem.tokens > 0) function(problem);
}

std::pair<std::int64_t, std::int64_t> get_decompose_dim(std::int64_t n) {
  constexpr std::int64_t kLargest = std::int64_t{1} << 40;
  require(n >= 1 && n <= kLargest, "n is ", n, "; it must be 1 to ", kLargest);
  // a^2 - b^2 = (a-b)(a+b): two factors of equal parity, so any two of one parity, the closest ones first. A number that is 2
  // mod 4 has no such pair, and the search over a would never end.
  const bool has_equal_parity = n % 4 != 2;
  for (std::int64_t low = whole_root(n); low > 1; --low) {
    if (n % low == 0 && (!has_equal_parity || (low - n / low) % 2 == 0)) return {low, n / low};
  }
  return {1, n};
}

std::int64_t linear_w4a4_workspace_bytes(std::int64_t tokens, std::int64_t columns, std::int64_t out_features,
                                         DeviceKind device) {
  require(tokens >= 0 && columns >= 1 && out_features >= 0, "tokens is ", tokens, ", columns ", columns,
          ", out_features ", out_features, "; they must be at least 0, 1 and 0");
  return device == DeviceKind::kCpu ? 0 : linear_w4a4_workspace_bytes(tokens, columns, out_features);
}

void linear_w4a4(const Int4Rows& x, const Int4Rows& weight, const TensorView& bias, const TensorView& out,
                 const TensorView& workspace, void* stream) {
  const Device device = x.codes.device;
  LinearW4A4Problem problem;
  problem.x = checked_rows(x, "x", device);
  problem.weight = checked_rows(weight, "weight", device);
  const std::int64_t n = problem.x.columns;
  require(n == problem.weight.columns, "x has n = ", n, " but weight has ", problem.weight.columns);
  require(n <= kLongestRow, "x has n = ", n, "; it must be at most ", kLongestRow);
  require(!is_given(weight.zeros), "weight has zeros; weights are symmetric");
  require_out_type(out);
  require_exact(out, {"out"}, out.dtype, {problem.x.rows, problem.weight.rows}, device);
  if (is_given(bias)) {
    require_exact(bias, {"bias"}, out.dtype, {problem.weight.rows}, device);
    problem.bias = bias.data;
  }
  for (const TensorView* written : {&out, &workspace}) {
    const char* name = written == &out ? "out" : "workspace";
    require_apart(*written, name, x, "x");
    require_apart(*written, name, weight, "weight");
    require(!may_overlap(*written, bias), name, " overlaps bias in memory");
  }
  require(!may_overlap(out, workspace), "out overlaps workspace in memory");
  problem.out = out.data;
  problem.dtype = out.dtype;
  problem.workspace = checked_workspace(
      workspace, linear_w4a4_workspace_bytes(problem.x.rows, n, problem.weight.rows, device.kind), device);
  problem.stream = stream;
  const auto function = select<LinearW4A4Function>(Operation::kLinearW4A4, device.kind);
  if (out.num_elements() > 0) function(problem);
}

}  // namespace kvpack
