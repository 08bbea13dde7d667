// Views and the checks that every operation shares: each refusal shows both values.
#include "kvpack/tensor.h"

#include <gtest/gtest.h>

#include <vector>

#include "core/check.h"

namespace kvpack {
namespace {

/// Message of the InvalidArgument that a call throws.
template <typename Call>
std::string message_of(Call&& call) {
  try {
    call();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(TensorView, KnowsItsSizeAndContiguity) {
  float data[24];
  TensorView view = make_view(data, DType::kFloat32, {2, 3, 4});
  EXPECT_EQ(view.num_elements(), 24);
  EXPECT_TRUE(view.is_contiguous());
  view.strides[1] = 5;
  EXPECT_FALSE(view.is_contiguous());
  EXPECT_EQ(make_view(data, DType::kFloat32, {}).num_elements(), 1);
}

TEST(TensorView, RefusesTooManyDimensionsAndNegativeExtents) {
  EXPECT_NE(message_of([] { (void)make_view(nullptr, DType::kFloat32, {1, 1, 1, 1, 1}); }).find("at most 4"),
            std::string::npos);
  EXPECT_NE(message_of([] { (void)make_view(nullptr, DType::kFloat32, {2, -3}); }).find("-3"), std::string::npos);
}

TEST(SequencePair, NamesBothShapesTypesAndDevices) {
  std::vector<float> a(12);
  std::vector<float> b(12);
  const TensorView x = make_view(a.data(), DType::kFloat32, {3, 4});
  EXPECT_EQ(message_of([&] { require_sequence_pair(x, make_view(b.data(), DType::kFloat32, {4, 3})); }),
            "x has shape [3, 4] but out has [4, 3]");
  EXPECT_EQ(message_of([&] { require_sequence_pair(x, make_view(b.data(), DType::kFloat16, {3, 4})); }),
            "x is float32 but out is float16");
  TensorView elsewhere = make_view(b.data(), DType::kFloat32, {3, 4});
  elsewhere.device = {DeviceKind::kCuda, 1};
  EXPECT_EQ(message_of([&] { require_sequence_pair(x, elsewhere); }), "x is on cpu but out is on cuda:1");
}

TEST(SequencePair, RefusesPartialOverlapAndSharedOutputElements) {
  std::vector<float> a(32);
  const TensorView x = make_view(a.data(), DType::kFloat32, {3, 4});
  EXPECT_NO_THROW(require_sequence_pair(x, x));
  EXPECT_NO_THROW(require_sequence_pair(x, make_view(a.data() + 12, DType::kFloat32, {3, 4})));
  EXPECT_NE(
      message_of([&] { require_sequence_pair(x, make_view(a.data() + 4, DType::kFloat32, {3, 4})); }).find("overlap"),
      std::string::npos);
  TensorView broadcast = make_view(a.data() + 16, DType::kFloat32, {3, 4});
  broadcast.strides[0] = 0;
  EXPECT_NE(message_of([&] { require_sequence_pair(x, broadcast); }).find("[0, 1]"), std::string::npos);
}

TEST(SequencePair, RefusesOtherRanksIntegersAndMissingMemory) {
  std::int64_t data[4] = {};
  EXPECT_NE(message_of([&] {
              require_sequence_pair(make_view(data, DType::kFloat32, {4}), make_view(data, DType::kFloat32, {4}));
            }).find("[tokens, channels]"),
            std::string::npos);
  const TensorView integers = make_view(data, DType::kInt64, {2, 2});
  EXPECT_NE(message_of([&] { require_sequence_pair(integers, integers); }).find("int64"), std::string::npos);
  const TensorView nowhere = make_view(nullptr, DType::kFloat32, {2, 2});
  EXPECT_NE(message_of([&] { require_sequence_pair(nowhere, nowhere); }).find("no memory"), std::string::npos);
}

}  // namespace
}  // namespace kvpack
