// What FlatQuant's operations refuse, with both values in the message, before anything is written.
#include <gtest/gtest.h>

#include <functional>

#include "flatquant/flatquant_cases.h"

namespace kvpack::test {
namespace {

/// The message of what a call throws; fails when it throws nothing, or something else.
std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

/// A call that is right, to be spoiled.
struct Call {
  explicit Call(DType form = DType::kInt32) : out(form, 3, 64, false), x(3, 64, DType::kFloat32) {
    x.fill(Fill::kNormal, 1);
    output = {out.rows(), 1.0, 1.0};
    view = x.view();
    transform = matrices.transform;
  }
  void run() const { kron_quantize(view, transform, {&output, 1}, {}); }
  CaseMatrices matrices{{"", 8, 8}, DType::kFloat32, false, 1};
  OutputBuffers out;
  Matrix x;
  KronOutput output;
  TensorView view;
  KronTransform transform;
};

/// Runs a spoiled call; its message must hold both texts and nothing may be written.
void expect_refusal(Call& call, const std::string& given, const std::string& allowed) {
  const Buffer untouched(call.out.codes.view().dtype, 3, call.out.codes.view().shape[1]);
  const std::string message = refusal([&] { call.run(); });
  EXPECT_NE(message.find(given), std::string::npos) << message;
  EXPECT_NE(message.find(allowed), std::string::npos) << message;
  EXPECT_TRUE(call.out.codes.same_bytes(untouched)) << message;
}

TEST(KronErrors, SidesThatDoNotMultiplyToN) {
  const CaseMatrices other({"", 8, 4}, DType::kFloat32, false, 1);
  Call call;
  call.transform.right = other.right.view();
  expect_refusal(call, "M*N is 32", "n = 64");
  call.transform = {};
  const CaseMatrices seven({"", 7, 1}, DType::kFloat32, false, 1);
  call.transform.left = seven.left.view();
  expect_refusal(call, "left is [7, 7]", "n = 64");
}

TEST(KronErrors, RowsThatDoNotPack) {
  for (const DType form : {DType::kInt32, DType::kUInt8}) {
    Call call(form);
    call.view.shape[1] = 63;
    call.transform = {};
    expect_refusal(call, "n is 63", form == DType::kInt32 ? "multiple of 8" : "multiple of 2");
  }
}

TEST(KronErrors, ClipsOutsideOneAndZero) {
  for (const double clip : {0.0, -0.5, 1.0001, std::nan(""), 1e-60}) {
    Call call;
    call.output.clip_min = clip;
    expect_refusal(call, "clip_min is", clip == 1e-60 ? "float32 rounds to 0" : "above 0 and at most 1");
    call.output.clip_min = 1.0;
    call.output.clip_max = clip;
    expect_refusal(call, "clip_max is", "0");
  }
}

TEST(KronErrors, TypesAndDevicesThatDiffer) {
  const CaseMatrices half({"", 8, 8}, DType::kFloat16, false, 1);
  Call call;
  call.transform.left = half.left.view();
  expect_refusal(call, "left is float16", "expected float32");
  call.transform = call.matrices.transform;
  call.transform.right.device = {DeviceKind::kCuda, 1};
  expect_refusal(call, "right is on cuda:1", "expected cpu");
  call.transform = call.matrices.transform;
  call.view.dtype = DType::kFloat64;
  expect_refusal(call, "x is float64", "float16, bfloat16 or float32");
  call.view.dtype = DType::kFloat32;
  call.output.rows.codes.dtype = DType::kFloat32;
  expect_refusal(call, "codes is float32", "int8");
}

TEST(KronErrors, ShapesStridesAndCounts) {
  Call call;
  call.view.shape[1] = 0;
  expect_refusal(call, "n = 0", "at least 1");
  call.view = call.x.view();
  call.view.strides[1] = 2;
  expect_refusal(call, "strides", "must be 1");
  call.view = call.x.view();
  call.view.rank = 1;
  expect_refusal(call, "x has shape [3]", "[tokens, n]");
  call.view = call.x.view();
  call.output.rows.codes.shape[0] = 2;
  call.output.rows.scales.shape[0] = 2;
  expect_refusal(call, "2 rows of 64 codes", "3 tokens");
  call.output = {call.out.rows(), 1.0, 1.0};
  call.output.rows.scales.shape[1] = 2;
  expect_refusal(call, "scales has shape [3, 2]", "expected [3, 1]");
  call.output = {call.out.rows(), 1.0, 1.0};
  call.output.rows.encoding = static_cast<CodeEncoding>(7);
  expect_refusal(call, "encoding number 7", "");
  EXPECT_NE(refusal([&] { kron_quantize(call.view, call.transform, {}, {}); }).find("0 outputs"), std::string::npos);
}

TEST(KronErrors, Int8CodesKnowNoOffset) {
  Call call(DType::kInt8);
  call.output.rows.encoding = CodeEncoding::kOffset;
  expect_refusal(call, "int8 codes", "packed");
}

TEST(KronErrors, OutputsThatOverlapOrDiffer) {
  Call call;
  call.output.rows.codes.data = call.x.view().data;
  expect_refusal(call, "x overlaps outputs[0]", "memory");
  call.output = {call.out.rows(), 1.0, 1.0};
  const KronOutput twice[] = {call.output, call.output};
  EXPECT_NE(
      refusal([&] { kron_quantize(call.view, call.transform, twice, {}); }).find("outputs[1] overlaps outputs[0]"),
      std::string::npos);
  const OutputBuffers affine(DType::kInt32, 3, 64, true);
  const KronOutput mixed[] = {call.output, {affine.rows(), 1.0, 1.0}};
  EXPECT_NE(refusal([&] { kron_quantize(call.view, call.transform, mixed, {}); }).find("outputs[1] has zeros"),
            std::string::npos);
  const KronOutput five[] = {call.output, call.output, call.output, call.output, call.output};
  EXPECT_NE(refusal([&] { kron_quantize(call.view, call.transform, five, {}); }).find("5 outputs"), std::string::npos);
}

TEST(KronErrors, ProducersCheckTheirSecondInput) {
  Call call;
  Matrix up(3, 63, DType::kFloat32);
  const KronOutput* output = &call.output;
  EXPECT_NE(refusal([&] { silu_mul_kron_quantize(call.view, up.view(), {}, {output, 1}, {}); }).find("[3, 63]"),
            std::string::npos);
  EXPECT_NE(refusal([&] { rmsnorm_kron_quantize(call.view, up.view(), 1e-6, {}, {output, 1}, {}); }).find("[64]"),
            std::string::npos);
  TensorView weight = up.view();
  weight.rank = 1;
  weight.shape = {64, 0, 0, 0};
  weight.strides = {1, 0, 0, 0};
  EXPECT_NE(refusal([&] { rmsnorm_kron_quantize(call.view, weight, -1.0, {}, {output, 1}, {}); }).find("epsilon is -1"),
            std::string::npos);
}

TEST(KronErrors, ReadersOfCodes) {
  Call call;
  Matrix out(3, 63, DType::kFloat32);
  EXPECT_NE(refusal([&] { dequantize_int4(call.output.rows, out.view()); }).find("expected [3, 64]"),
            std::string::npos);
  const OutputBuffers weight(DType::kInt8, 5, 63, false);
  EXPECT_NE(refusal([&] { linear_w4a4(call.output.rows, weight.rows(), {}, out.view(), {}); }).find("x has n = 64 but"),
            std::string::npos);
  const OutputBuffers affine(DType::kInt8, 5, 64, true);
  EXPECT_NE(refusal([&] { linear_w4a4(call.output.rows, affine.rows(), {}, out.view(), {}); }).find("weight has zeros"),
            std::string::npos);
  EXPECT_NE(refusal([&] { undo_transform(call.view, call.transform, call.view); }).find("overlap"), std::string::npos);
  EXPECT_NE(refusal([&] { (void)get_decompose_dim(0); }).find("n is 0"), std::string::npos);
}

}  // namespace
}  // namespace kvpack::test
