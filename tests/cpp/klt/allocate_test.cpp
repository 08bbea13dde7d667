// Sharing out levels, and fitting codebooks: against plain searches.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "kvpack/kvpack.h"
#include "support/compare.h"
#include "support/tiles.h"

namespace kvpack::test {
namespace {

struct Wanted {
  std::vector<std::int32_t> levels{1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 32, 64};
  std::vector<double> errors;
  std::vector<std::int32_t> table_of;

  /// Coefficients whose loss falls as that of a Gaussian, disturbed.
  Wanted(std::int64_t coefficients, std::int32_t tables, std::uint32_t seed) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> uniform(0.9, 1.1);
    for (std::int64_t n = 0; n < coefficients; ++n) {
      const double variance =
          std::exp(-4.0 * uniform(random) * static_cast<double>(n) / static_cast<double>(coefficients));
      for (const std::int32_t l : levels) {
        errors.push_back(l == 1 ? variance : variance * uniform(random) * 1.5 / (l * l));
      }
      table_of.push_back(static_cast<std::int32_t>(n) % tables);
    }
  }
  [[nodiscard]] KltAllocation view(double budget, KltBits bits, std::int32_t tables) const {
    return {static_cast<std::int64_t>(table_of.size()),
            tables,
            static_cast<std::int64_t>(levels.size()),
            levels.data(),
            errors.data(),
            table_of.data(),
            2,
            budget,
            bits};
  }
  [[nodiscard]] double loss(const std::vector<std::int32_t>& chosen) const {
    double sum = 0.0;
    for (std::size_t n = 0; n < chosen.size(); ++n) {
      for (std::size_t m = 0; m < levels.size(); ++m) {
        if (levels[m] == chosen[n]) sum += errors[n * levels.size() + m];
      }
    }
    return sum;
  }
};

TEST(Allocation, TakesTheStepOfTheLargestFallPerBitEveryTime) {
  for (const double budget : {0.0, 10.0, 60.0, 200.0, 1e6}) {
    const Wanted wanted(40, 1, kSeed);
    std::vector<std::int32_t> chosen(40);
    const double bits = allocate_klt_levels(wanted.view(budget, KltBits::kEntropy, 1), chosen.data());
    // The same without a heap, every step found anew among all.
    std::vector<std::size_t> places(40, 0);
    double left = budget;
    for (bool has_scale = false;;) {
      double best = 0.0, cost_of_best = 0.0;
      std::size_t who = 0, where = 0;
      for (std::size_t n = 0; n < 40; ++n) {
        for (std::size_t m = places[n] + 1; m < wanted.levels.size(); ++m) {
          const double cost = std::log2(wanted.levels[m]) - std::log2(wanted.levels[places[n]]);
          const double fall = (wanted.errors[n * 14 + places[n]] - wanted.errors[n * 14 + m]) / cost;
          if (cost + (has_scale ? 0.0 : 8.0) <= left && fall > best) {
            best = fall, cost_of_best = cost, who = n, where = m;
          }
        }
      }
      if (best == 0.0) break;
      left -= cost_of_best + (has_scale ? 0.0 : 8.0);
      has_scale = true;
      places[who] = where;
    }
    EXPECT_NEAR(bits, budget - left, 1e-9);
    for (std::size_t n = 0; n < 40; ++n) EXPECT_EQ(chosen[n], wanted.levels[places[n]]) << "budget " << budget;
  }
}

TEST(Allocation, NeverTakesMoreBytesThanTheBudgetAndLeavesFewUnused) {
  for (const double budget : {100.0, 1000.0, 2200.0, 3500.0}) {
    const Wanted wanted(960, 5, kSeed);
    std::vector<std::int32_t> chosen(960);
    const double bits = allocate_klt_levels(wanted.view(budget, KltBits::kRows, 5), chosen.data());
    double measured = 0.0;
    for (std::int32_t table = 0; table < 5; ++table) {
      std::vector<std::int32_t> levels;
      for (std::size_t n = 0; n < 960; ++n) {
        if (wanted.table_of[n] == table && chosen[n] > 1) levels.push_back(chosen[n]);
      }
      std::sort(levels.rbegin(), levels.rend());
      measured += 8.0 * static_cast<double>(klt_row_bytes(levels.data(), static_cast<std::int64_t>(levels.size()), 2));
    }
    EXPECT_EQ(bits, measured);
    EXPECT_LE(bits, budget);
    EXPECT_GE(bits, budget - 5.0 * 16.0) << "a step of bytes a table may be left";
    std::vector<std::int32_t> bound(960);
    const double bound_bits = allocate_klt_levels(wanted.view(budget, KltBits::kEntropy, 5), bound.data());
    EXPECT_LE(bound_bits, budget);
    EXPECT_LE(wanted.loss(chosen), wanted.loss(bound) * 1.25);
  }
}

TEST(Allocation, RefusesWhatMakesNoSense) {
  const auto refuse = [](auto&& change) {
    Wanted wanted(6, 2, kSeed);
    KltAllocation allocation = wanted.view(50.0, KltBits::kRows, 2);
    change(wanted, allocation);
    std::vector<std::int32_t> chosen(6);
    return refusal([&] { (void)allocate_klt_levels(allocation, chosen.data()); });
  };
  const auto has = [](const std::string& message, const char* words) {
    EXPECT_NE(message.find(words), std::string::npos) << message;
  };
  has(refuse([](Wanted& w, KltAllocation&) { w.errors[17] = NAN; }), "errors[1, 3] is nan");
  has(refuse([](Wanted& w, KltAllocation&) { w.errors[0] = -1.0; }), "errors[0, 0] is -1");
  has(refuse([](Wanted& w, KltAllocation&) { w.table_of[3] = 2; }), "table_of[3] is 2 of 2 tables");
  has(refuse([](Wanted& w, KltAllocation&) { w.levels[0] = 2; }), "levels begin with 2");
  has(refuse([](Wanted& w, KltAllocation&) { w.levels[5] = 9; }), "levels[5] is 9");
  has(refuse([](Wanted&, KltAllocation& a) { a.budget_bits = -1.0; }), "budget_bits is -1");
  has(refuse([](Wanted&, KltAllocation& a) { a.budget_bits = INFINITY; }), "budget_bits is inf");
  has(refuse([](Wanted&, KltAllocation& a) { a.row_alignment = 1; }), "row_alignment is 1");
}

/// Samples [tokens, 3]: a normal, a constant, and one of four values.
std::vector<float> make_samples(std::int64_t tokens) {
  std::mt19937 random(kSeed);
  std::normal_distribution<float> normal;
  std::vector<float> z;
  for (std::int64_t t = 0; t < tokens; ++t) {
    z.push_back(normal(random));
    z.push_back(2.5f);
    z.push_back(static_cast<float>(t % 4) - 1.5f);
  }
  return z;
}

struct Fitted {
  std::vector<std::int32_t> levels{1, 2, 4, 5};
  std::vector<float> centroids = std::vector<float>(3 * 12);
  std::vector<double> errors = std::vector<double>(3 * 4);
};

Fitted fit(std::vector<float>& z, std::vector<float>* weights = nullptr) {
  Fitted fitted;
  const auto tokens = static_cast<std::int64_t>(z.size() / 3);
  KltSamples samples{make_view(z.data(), DType::kFloat32, {tokens, 3}), {}, 4, fitted.levels.data()};
  if (weights != nullptr) samples.weights = make_view(weights->data(), DType::kFloat32, {tokens});
  calibrate_klt_codebooks(samples, make_view(fitted.centroids.data(), DType::kFloat32, {3, 12}),
                          make_view(fitted.errors.data(), DType::kFloat64, {3, 4}));
  return fitted;
}

TEST(KltCodebooks, AreTheExactOptimumOnFewSamples) {
  std::vector<float> z = make_samples(500);
  const Fitted fitted = fit(z);
  std::vector<double> column;
  for (std::size_t t = 0; t < 500; ++t) column.push_back(static_cast<double>(z[3 * t]));
  std::int64_t first = 0;
  for (std::size_t m = 0; m < 4; ++m) {
    std::vector<float> exact(static_cast<std::size_t>(fitted.levels[m]));
    const double error = calibrate_codebook(column.data(), nullptr, 500, fitted.levels[m], exact.data());
    EXPECT_NEAR(fitted.errors[m], error / 500.0, 1e-7);
    for (std::size_t i = 0; i < exact.size(); ++i) {
      EXPECT_EQ(fitted.centroids[static_cast<std::size_t>(first) + i], exact[i]) << fitted.levels[m] << " levels";
    }
    first += fitted.levels[m];
  }
  for (std::size_t m = 0; m < 4; ++m) EXPECT_EQ(fitted.errors[4 + m], 0.0) << "a constant needs one centroid";
  EXPECT_EQ(fitted.errors[8 + 2], 0.0) << "four values, four centroids";
}

TEST(KltCodebooks, NearlyReachTheGaussianOptimumOnManySamplesAndAscendAlways) {
  std::vector<float> z = make_samples(20000);
  const Fitted fitted = fit(z);
  EXPECT_NEAR(fitted.errors[1], 0.3634, 0.01);  // Max 1960
  EXPECT_NEAR(fitted.errors[2], 0.1175, 0.003);
  EXPECT_NEAR(fitted.errors[3], 0.0799, 0.003);
  for (std::size_t k = 0; k < 3; ++k) {
    std::size_t place = 12 * k;
    for (const std::int32_t levels : fitted.levels) {
      for (std::int32_t i = 1; i < levels; ++i) {
        EXPECT_LT(fitted.centroids[place + static_cast<std::size_t>(i) - 1],
                  fitted.centroids[place + static_cast<std::size_t>(i)]);
      }
      place += static_cast<std::size_t>(levels);
    }
  }
}

TEST(KltCodebooks, LeaveTheErrorThatIsMeasured) {
  for (const std::int64_t tokens : {300, 5000}) {
    std::vector<float> z = make_samples(tokens);
    std::vector<float> weights;
    for (std::int64_t t = 0; t < tokens; ++t) weights.push_back(static_cast<float>(t % 7));
    Fitted fitted = fit(z, &weights);
    std::vector<double> measured(12);
    const KltSamples samples{make_view(z.data(), DType::kFloat32, {tokens, 3}),
                             make_view(weights.data(), DType::kFloat32, {tokens}), 4, fitted.levels.data()};
    measure_klt_errors(samples, make_view(fitted.centroids.data(), DType::kFloat32, {3, 12}),
                       make_view(measured.data(), DType::kFloat64, {3, 4}));
    for (std::size_t i = 0; i < 12; ++i) {
      EXPECT_EQ(measured[i], fitted.errors[i]);
    }
  }
}

TEST(KltGrids, AreAsGoodAsAnyGridOfAFineSearch) {
  std::vector<float> z = make_samples(900);
  const std::vector<std::int32_t> levels{1, 2, 4, 8, 16};
  std::vector<float> offsets(15), steps(15);
  std::vector<double> errors(15);
  const KltSamples samples{make_view(z.data(), DType::kFloat32, {900, 3}), {}, 5, levels.data()};
  calibrate_klt_grids(samples, make_view(offsets.data(), DType::kFloat32, {3, 5}),
                      make_view(steps.data(), DType::kFloat32, {3, 5}),
                      make_view(errors.data(), DType::kFloat64, {3, 5}));
  for (std::size_t m = 1; m < 5; ++m) {
    double best = 1e30;
    for (double step = 0.05; step < 2.5; step += 0.01) {
      for (double shift = -0.5; shift <= 0.5; shift += 0.05) {
        double error = 0.0;
        for (std::size_t t = 0; t < 900; ++t) {
          const double v = static_cast<double>(z[3 * t]);
          const double offset = (shift - 0.5 * (levels[m] - 1)) * step;
          const double code = std::fmin(std::fmax(std::floor((v - offset) / step + 0.5), 0.0), levels[m] - 1.0);
          error += (v - offset - code * step) * (v - offset - code * step);
        }
        best = std::fmin(best, error / 900.0);
      }
    }
    EXPECT_LE(errors[m], best * 1.02) << levels[m] << " levels";
    EXPECT_GT(steps[m], 0.0f);
  }
  for (std::size_t m = 0; m < 5; ++m) EXPECT_NEAR(errors[5 + m], 0.0, 1e-12) << "a constant";
}

TEST(KltSamples, ThatAreWrongAreNamed) {
  std::vector<float> z = make_samples(10);
  z[7] = NAN;
  EXPECT_NE(refusal([&] { fit(z); }).find("z[2, 1] is nan"), std::string::npos);
  z[7] = 0.0f;
  std::vector<float> weights(10, 0.0f);
  EXPECT_NE(refusal([&] { fit(z, &weights); }).find("all 10 weights are 0"), std::string::npos);
  weights[4] = -1.0f;
  EXPECT_NE(refusal([&] { fit(z, &weights); }).find("weights[4] is -1"), std::string::npos);
}

}  // namespace
}  // namespace kvpack::test
