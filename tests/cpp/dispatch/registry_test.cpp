// Listing, forcing and explaining implementations.
#include <gtest/gtest.h>

#include <set>
#include <vector>

#include "kvpack/kvpack.h"
#include "support/implementations.h"

namespace kvpack {
namespace {

TEST(Registry, EveryOperationHasAReferenceAndExactlyOneSelectedImplementation) {
  std::set<std::string> operations;
  std::set<std::string> with_reference;
  std::vector<std::string> selected;
  for (const ImplementationInfo& info : list_implementations()) {
    if (info.device != DeviceKind::kCpu) continue;
    operations.insert(info.operation);
    if (info.name == "reference") with_reference.insert(info.operation);
    if (info.selected) selected.push_back(info.operation);
    EXPECT_TRUE(info.available || !info.selected) << info.operation << " " << info.name;
  }
  EXPECT_EQ(operations, with_reference);
  EXPECT_EQ(std::multiset<std::string>(selected.begin(), selected.end()),
            std::multiset<std::string>(operations.begin(), operations.end()));
}

TEST(Registry, TheForcedImplementationRunsAndIsNamed) {
  float data[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  const TensorView x = make_view(data, DType::kFloat32, {2, 4});
  const test::Forced forced("scalar");
  prune_magnitude(x, x, PruneOptions{});
  EXPECT_EQ(last_implementation(), "scalar");
  EXPECT_NE(explain("prune_magnitude").find("runs scalar: forced by name"), std::string::npos);
}

TEST(Registry, TheTileFormatsAndAttentionAreListedAndCanBeForced) {
  const test::Forced forced("scalar");
  for (const char* operation : {"compress_tile64", "unpack_tile64", "multiply_tile64", "attend_tile64"}) {
    std::set<std::string> names;
    for (const ImplementationInfo& info : list_implementations()) {
      if (info.operation == operation && info.device == DeviceKind::kCpu) names.insert(info.name);
    }
    EXPECT_TRUE(names.contains("reference") && names.contains("scalar")) << operation;
    EXPECT_NE(explain(operation).find("runs scalar: forced by name"), std::string::npos) << explain(operation);
  }
  EXPECT_NE(explain("check_tile64").find("runs reference: \"scalar\" is forced, but"), std::string::npos);
}

TEST(Registry, AnOperationWithoutTheForcedNameSaysSo) {
  const test::Forced forced("scalar");
  EXPECT_NE(explain("compare_tensors").find("\"scalar\" is forced, but this operation has only reference"),
            std::string::npos);
}

TEST(Registry, UnknownNamesAreRefusedWithTheKnownOnes) {
  try {
    force_implementation("sse9");
    FAIL() << "sse9 was accepted";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("\"sse9\""), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("reference, scalar"), std::string::npos);
  }
  EXPECT_THROW((void)explain("fly"), InvalidArgument);
}

TEST(Registry, ADeviceWithoutImplementationsIsUnsupportedAndListsWhatExists) {
  if (cuda_status().starts_with("loaded")) GTEST_SKIP() << "this machine has a GPU: " << cuda_status();
  float data[4] = {};
  TensorView x = make_view(data, DType::kFloat32, {2, 2});
  x.device = {DeviceKind::kCuda, 0};
  try {
    prune_magnitude(x, x, PruneOptions{});
    FAIL() << "a GPU operation ran without a GPU";
  } catch (const Unsupported& error) {
    EXPECT_NE(std::string(error.what()).find("on cpu reference, scalar"), std::string::npos) << error.what();
  }
}

TEST(Threads, ANegativeNumberIsRefused) {
  EXPECT_THROW(set_num_threads(-1), InvalidArgument);
  set_num_threads(3);
  EXPECT_EQ(num_threads(), 3);
  set_num_threads(0);
  EXPECT_GE(num_threads(), 1);
}

}  // namespace
}  // namespace kvpack
