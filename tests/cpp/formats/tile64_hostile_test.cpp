// Bytes from outside: whatever they say, no implementation reads or writes outside the views. What that means is found by
// AddressSanitizer (make test-asan): parts lie in memory of exactly their size here. tests/fuzz goes on without a bound.
#include <gtest/gtest.h>

#include <memory>
#include <random>

#include "support/compare.h"
#include "support/hostile_tiles.h"
#include "support/implementations.h"

namespace kvpack::test {
namespace {

class HostileTile64 : public ImplementationTest {};
std::vector<std::string> all_implementations() {
  std::vector<std::string> names = cpu_implementations("attend_tile64");
  names.insert(names.begin(), "reference");
  return names;
}
INSTANTIATE_TEST_SUITE_P(Cpu, HostileTile64, ::testing::ValuesIn(all_implementations()), test_name);

TEST_P(HostileTile64, MutatedBytesAreReadOrRefused) {
  set_num_threads(1);
  std::mt19937 random(kSeed);
  int refused = 0;
  constexpr int kRounds = 300;
  for (int round = 0; round < kRounds; ++round) {
    SCOPED_TRACE("round " + std::to_string(round) + " of seed " + std::to_string(kSeed));
    HostileInput input;
    for (std::uint8_t& byte : input.choices) byte = static_cast<std::uint8_t>(random());
    input.noise.resize(random() % 3 == 0 ? 4096 : random() % 24);  // random bytes everywhere, or a few mutations
    for (std::uint8_t& byte : input.noise) byte = static_cast<std::uint8_t>(random());
    const int calls = run_hostile(input);
    ASSERT_GE(calls, 0) << "something was written before the bytes were refused";
    refused += calls;
  }
  set_num_threads(0);
  EXPECT_GT(refused, 0) << "no input was bad enough";
}

}  // namespace
}  // namespace kvpack::test
