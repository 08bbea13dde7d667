// Checks that the entries of FlatQuant's operations share.
#include "flatquant/checks.h"

#include "flatquant/codes.h"

namespace kvpack {

namespace {

CodeForm form_of(const TensorView& codes, const char* name) {
  switch (codes.dtype) {
    case DType::kInt8:
      return CodeForm::kInt8;
    case DType::kInt32:
      return CodeForm::kPackedWords;
    case DType::kUInt8:
      return CodeForm::kPairs;
    default:
      throw InvalidArgument(text(name, ".codes is ", name_of(codes.dtype),
                                 "; expected int8 (a code an element), int32 (eight) or uint8 (two)"));
  }
}

/// A side of one matrix, 0 where it is absent.
std::int64_t checked_side(const TensorView& matrix, const char* name, DType dtype, const Device& device) {
  if (!is_given(matrix)) return 0;
  if (matrix.rank != 2 || matrix.shape[0] != matrix.shape[1] || matrix.shape[0] < 1) {
    throw InvalidArgument(text(name, " has shape ", shape_text(matrix), "; expected a square matrix"));
  }
  const std::int64_t side = matrix.shape[0];
  require_exact(matrix, {name}, dtype, {side, side}, device);
  return side;
}

}  // namespace

void require_token_rows(const TensorView& view, const char* name) {
  const bool is_known =
      view.dtype == DType::kFloat16 || view.dtype == DType::kBFloat16 || view.dtype == DType::kFloat32;
  require(is_known, name, " is ", name_of(view.dtype), "; expected float16, bfloat16 or float32");
  if (view.rank != 2 || view.shape[0] < 0) {
    throw InvalidArgument(text(name, " has shape ", shape_text(view), "; expected [tokens, n]"));
  }
  require(view.shape[1] >= 1, name, " has n = ", view.shape[1], "; it must be at least 1");
  if (view.num_elements() == 0) return;
  const bool is_adjacent = view.strides[1] == 1 || view.shape[1] == 1;
  if (!is_adjacent || view.strides[0] < 0) {
    throw InvalidArgument(text(name, " has the strides ", text_of(view.strides, view.rank),
                               "; that of the channels must be 1 and that of the rows at least 0"));
  }
  if (view.data == nullptr) throw InvalidArgument(text(name, " of shape ", shape_text(view), " has no memory"));
}

KronMatrices checked_matrices(const KronTransform& transform, std::int64_t n, DType dtype, const Device& device) {
  KronMatrices matrices;
  const std::int64_t left = checked_side(transform.left, "left", dtype, device);
  const std::int64_t right = checked_side(transform.right, "right", dtype, device);
  if (left != 0 && right != 0) {
    require(right == n / left && left * right == n, "left is ", shape_text(transform.left), " and right ",
            shape_text(transform.right), ", so that M*N is ", left * right, ", but rows have n = ", n);
  } else {
    const std::int64_t side = left + right;
    require(side == 0 || n % side == 0, left != 0 ? "left" : "right", " is [", side, ", ", side,
            "], which does not divide n = ", n);
  }
  matrices.rows = left != 0 ? left : (right != 0 ? n / right : 1);
  matrices.columns = n / matrices.rows;
  matrices.left = left != 0 ? transform.left.data : nullptr;
  matrices.right = right != 0 ? transform.right.data : nullptr;
  if (is_given(transform.diagonal)) {
    require_exact(transform.diagonal, {"diagonal"}, dtype, {n}, device);
    matrices.diagonal = transform.diagonal.data;
  }
  return matrices;
}

Int4Data checked_rows(const Int4Rows& rows, const char* name, const Device& device) {
  Int4Data data;
  const TensorView& codes = rows.codes;
  data.form = form_of(codes, name);
  const bool is_known = rows.encoding == CodeEncoding::kTwosComplement || rows.encoding == CodeEncoding::kOffset;
  require(is_known, "there is no encoding number ", static_cast<int>(rows.encoding));
  require(data.form != CodeForm::kInt8 || rows.encoding == CodeEncoding::kTwosComplement, name,
          " has int8 codes, which hold q itself, but encoding offset; it is for packed codes");
  if (codes.rank != 2 || codes.shape[0] < 0 || codes.shape[1] < 0) {
    throw InvalidArgument(text(name, ".codes has shape ", shape_text(codes), "; expected [rows, n] or packed columns"));
  }
  data.encoding = rows.encoding;
  data.rows = codes.shape[0];
  data.columns = codes.shape[1] * codes_per_element(data.form);
  require(data.columns >= 1, name, ".codes have n = ", data.columns, "; it must be at least 1");
  require_exact(codes, {name, "codes"}, codes.dtype, {codes.shape[0], codes.shape[1]}, device);
  require_exact(rows.scales, {name, "scales"}, DType::kFloat32, {data.rows, 1}, device);
  data.codes = codes.data;
  data.scales = static_cast<const float*>(rows.scales.data);
  if (is_given(rows.zeros)) {
    require_exact(rows.zeros, {name, "zeros"}, DType::kFloat32, {data.rows, 1}, device);
    data.zeros = static_cast<const float*>(rows.zeros.data);
  }
  return data;
}

void require_apart(const TensorView& out, const char* out_name, const Int4Rows& rows, const char* name) {
  for (const TensorView* view : {&rows.codes, &rows.scales, &rows.zeros}) {
    require(!may_overlap(out, *view), out_name, " overlaps ", name, " in memory");
  }
}

void require_apart(const TensorView& out, const char* out_name, const KronTransform& transform) {
  for (const TensorView* view : {&transform.left, &transform.right, &transform.diagonal}) {
    require(!may_overlap(out, *view), out_name, " overlaps a matrix of the transform in memory");
  }
}

}  // namespace kvpack
