// Runs a test once for each implementation of an operation that this machine has; a skip says why.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kvpack/dispatch.h"
#include "kvpack/error.h"

namespace kvpack::test {

/// Names of an operation's CPU implementations, reference left out.
inline std::vector<std::string> cpu_implementations(const std::string& operation) {
  std::vector<std::string> names;
  for (const ImplementationInfo& info : list_implementations()) {
    const bool wanted = info.operation == operation && info.device == DeviceKind::kCpu && info.name != "reference";
    if (wanted) names.push_back(info.name);
  }
  return names;
}

/// Forces an implementation for the life of the object.
class Forced {
 public:
  explicit Forced(const std::string& name) { force_implementation(name); }
  ~Forced() { force_implementation(""); }
  Forced(const Forced&) = delete;
  Forced& operator=(const Forced&) = delete;
};

/// A test parameterised by implementation; skips with the reason where the machine lacks it.
class ImplementationTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    try {
      force_implementation(GetParam());
    } catch (const Unsupported& error) {
      GTEST_SKIP() << error.what();
    }
  }
  void TearDown() override { force_implementation(""); }
};

inline std::string test_name(const ::testing::TestParamInfo<std::string>& info) { return info.param; }

}  // namespace kvpack::test
