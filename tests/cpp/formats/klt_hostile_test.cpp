// Rows from outside: whatever they say, no implementation reads or writes outside the views. What that means is found by
// AddressSanitizer (make test-asan). tests/fuzz goes on without a bound.
#include <gtest/gtest.h>

#include <random>

#include "support/compare.h"
#include "support/hostile_klt.h"
#include "support/implementations.h"

namespace kvpack::test {
namespace {

class HostileKltRows : public ImplementationTest {};
std::vector<std::string> all_implementations() {
  std::vector<std::string> names = cpu_implementations("unpack_klt");
  names.insert(names.begin(), "reference");
  return names;
}
INSTANTIATE_TEST_SUITE_P(Cpu, HostileKltRows, ::testing::ValuesIn(all_implementations()), test_name);

TEST_P(HostileKltRows, AreReadOrRefused) {
  set_num_threads(1);
  std::mt19937 random(kSeed);
  int refused = 0;
  for (int round = 0; round < 200; ++round) {
    SCOPED_TRACE("round " + std::to_string(round) + " of seed " + std::to_string(kSeed));
    std::vector<std::uint8_t> data(random() % 1200);
    const bool is_sparse = round % 3 == 0;
    for (std::uint8_t& byte : data) byte = static_cast<std::uint8_t>(is_sparse && random() % 2 != 0 ? 0 : random());
    refused += run_hostile_klt(data.data(), data.size()) ? 1 : 0;
  }
  set_num_threads(0);
  EXPECT_GT(refused, 0) << "no input was bad enough";
}

}  // namespace
}  // namespace kvpack::test
