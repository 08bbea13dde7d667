// Comparing tensors: sums that can be counted by hand, in every type and layout.
#include <gtest/gtest.h>

#include "kvpack/kvpack.h"
#include "support/matrix.h"

namespace kvpack::test {
namespace {

TEST(CompareTensors, AddsUpSquaresInEveryTypeAndLayout) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
    Matrix x(3, 5, dtype, {2, 1, 1});
    Matrix y(3, 5, dtype);
    for (std::int64_t t = 0; t < 3; ++t) {
      for (std::int64_t c = 0; c < 5; ++c) {
        x.set(t, c, 2.0);
        y.set(t, c, t == 1 && c == 4 ? -1.0 : 2.0);
      }
    }
    const TensorError error = compare_tensors(x.view(), y.view());
    EXPECT_EQ(error.squared_error, 9.0);
    EXPECT_EQ(error.squared_norm, 60.0);
    EXPECT_EQ(error.largest, 3.0);
  }
}

TEST(CompareTensors, NothingDiffersInNothing) {
  const TensorView empty = make_view(nullptr, DType::kFloat32, {0, 4});
  EXPECT_EQ(compare_tensors(empty, empty).squared_norm, 0.0);
}

TEST(CompareTensors, DifferentShapesAreShown) {
  Matrix x(3, 5, DType::kFloat32);
  Matrix y(5, 3, DType::kFloat32);
  try {
    (void)compare_tensors(x.view(), y.view());
    FAIL() << "accepted";
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(error.what(), "x has shape [3, 5] but y has [5, 3]");
  }
}

}  // namespace
}  // namespace kvpack::test
