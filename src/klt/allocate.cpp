// Sharing out levels: the greedy choice, exact by a heap, in the units that rows really take.
#include <algorithm>
#include <cmath>
#include <queue>
#include <vector>

#include "core/check.h"
#include "formats/klt_rows/layout.h"
#include "kvpack/klt.h"

namespace kvpack {

namespace {

/// The best next step of one coefficient.
struct Step {
  double fall_per_bit = 0.0;
  std::int64_t coefficient = 0;
  std::int32_t from = 0;  // places in `levels`
  std::int32_t to = 0;
  // Of equal falls the lower coefficient comes first, so that the result does not depend on the heap.
  bool operator<(const Step& other) const {
    return fall_per_bit < other.fall_per_bit || (fall_per_bit == other.fall_per_bit && coefficient > other.coefficient);
  }
};

void require_allocation(const KltAllocation& a) {
  require(a.coefficients >= 0 && a.tables >= 0, "coefficients is ", a.coefficients, " and tables ", a.tables,
          "; both are at least 0");
  require(a.num_levels >= 1 && a.levels != nullptr && a.levels[0] == 1, "levels begin with ",
          a.num_levels >= 1 && a.levels != nullptr ? a.levels[0] : 0, "; they begin with 1");
  for (std::int64_t m = 1; m < a.num_levels; ++m) {
    require(klt_rows::index_of_levels(a.levels[m]) >= 0 && a.levels[m - 1] < a.levels[m], "levels[", m, "] is ",
            a.levels[m], " after ", a.levels[m - 1], "; levels ascend and rows have them");
  }
  require((a.errors != nullptr && a.table_of != nullptr) || a.coefficients == 0,
          "errors or table_of is a null pointer");
  for (std::int64_t n = 0; n < a.coefficients; ++n) {
    require(a.table_of[n] >= 0 && a.table_of[n] < a.tables, "table_of[", n, "] is ", a.table_of[n], " of ", a.tables,
            " tables");
    for (std::int64_t m = 0; m < a.num_levels; ++m) {
      const double error = a.errors[n * a.num_levels + m];
      require(std::isfinite(error) && error >= 0.0, "errors[", n, ", ", m, "] is ", error,
              "; errors are finite and at least 0");
    }
  }
  require(a.row_alignment == 2 || a.row_alignment == 4 || a.row_alignment == 8 || a.row_alignment == 16,
          "row_alignment is ", a.row_alignment, "; it is 2, 4, 8 or 16");
  require(std::isfinite(a.budget_bits) && a.budget_bits >= 0.0, "budget_bits is ", a.budget_bits,
          "; it is finite and at least 0");
  require(a.bits == KltBits::kEntropy || a.bits == KltBits::kRows, "there is no way to count bits number ",
          static_cast<int>(a.bits));
}

/// Levels chosen so far, and what they cost.
class Allocator {
 public:
  explicit Allocator(const KltAllocation& allocation) : a_(allocation) {
    for (std::int64_t m = 0; m < a_.num_levels; ++m) {
      const std::int32_t levels = a_.levels[m];
      bits_.push_back(a_.bits == KltBits::kEntropy ? std::log2(levels) : klt_level_bits(levels));
    }
  }

  /// Greedy steps from nothing until none fits into `budget` bits of coefficients and scales; returns the bits taken.
  double share(double budget) {
    places_.assign(static_cast<std::size_t>(a_.coefficients), 0);
    std::vector<bool> has_row(static_cast<std::size_t>(a_.tables), false);
    std::priority_queue<Step> heap;
    for (std::int64_t n = 0; n < a_.coefficients; ++n) push_step(n, budget, heap);
    double left = budget;
    while (!heap.empty()) {
      const Step step = heap.top();
      heap.pop();
      const auto table = static_cast<std::size_t>(a_.table_of[step.coefficient]);
      const double scale = has_row[table] ? 0.0 : klt_rows::kScaleBits;
      const double cost = cost_of(step) + scale;
      if (cost <= left) {
        left -= cost;
        has_row[table] = true;
        place(step.coefficient) = step.to;
        push_step(step.coefficient, left, heap);
      } else {
        // A smaller step of the same coefficient may still fit.
        push_step(step.coefficient, std::nextafter(cost_of(step), 0.0), heap);
      }
    }
    return budget - left;
  }

  /// Bits of all rows as they lie in memory.
  [[nodiscard]] double row_bits() const {
    double bits = 0.0;
    for (const auto& counts : counts_of_tables()) bits += 8.0 * layout_of(counts).row_bytes;
    return bits;
  }

  /// Takes steps that the padding of a table's rows has room for, best first.
  void fill_padding() {
    std::vector<Counts> counts = counts_of_tables();
    std::priority_queue<Step> heap;
    const double any = 64.0;
    for (std::int64_t n = 0; n < a_.coefficients; ++n) push_step(n, any, heap);
    while (!heap.empty()) {
      const Step step = heap.top();
      heap.pop();
      Counts& old = counts[static_cast<std::size_t>(a_.table_of[step.coefficient])];
      Counts changed = old;
      move_count(changed, step);
      const std::int32_t room = layout_of(old).row_bytes;
      if (room > 0 && layout_of(changed).row_bytes <= room) {
        old = changed;
        place(step.coefficient) = step.to;
        push_step(step.coefficient, any, heap);
      } else {
        push_step(step.coefficient, std::nextafter(cost_of(step), 0.0), heap);
      }
    }
  }

  void write(std::int32_t* chosen) const {
    for (std::size_t n = 0; n < places_.size(); ++n) chosen[n] = a_.levels[places_[n]];
  }

 private:
  struct Counts {
    std::int32_t of[kNumKltLevels] = {};
  };

  [[nodiscard]] std::int32_t& place(std::int64_t n) { return places_[static_cast<std::size_t>(n)]; }
  [[nodiscard]] double cost_of(const Step& step) const {
    return bits_[static_cast<std::size_t>(step.to)] - bits_[static_cast<std::size_t>(step.from)];
  }
  [[nodiscard]] klt_rows::RowLayout layout_of(const Counts& counts) const {
    return klt_rows::make_layout(counts.of, static_cast<std::int32_t>(a_.row_alignment));
  }
  void move_count(Counts& counts, const Step& step) const {
    if (step.from > 0) --counts.of[klt_rows::index_of_levels(a_.levels[step.from])];
    ++counts.of[klt_rows::index_of_levels(a_.levels[step.to])];
  }
  [[nodiscard]] std::vector<Counts> counts_of_tables() const {
    std::vector<Counts> counts(static_cast<std::size_t>(a_.tables));
    for (std::size_t n = 0; n < places_.size(); ++n) {
      const std::int32_t index = klt_rows::index_of_levels(a_.levels[places_[n]]);
      if (index >= 0) ++counts[static_cast<std::size_t>(a_.table_of[n])].of[index];
    }
    return counts;
  }

  /// Puts the step with the largest fall per bit among those that cost at most `most_bits` into the heap, if any falls.
  void push_step(std::int64_t n, double most_bits, std::priority_queue<Step>& heap) {
    const double* errors = a_.errors + n * a_.num_levels;
    const std::int32_t from = place(n);
    Step best{0.0, n, from, from};
    for (std::int32_t to = from + 1; to < a_.num_levels; ++to) {
      const double cost = bits_[static_cast<std::size_t>(to)] - bits_[static_cast<std::size_t>(from)];
      const double fall = (errors[from] - errors[to]) / cost;
      if (cost <= most_bits && fall > best.fall_per_bit) best = {fall, n, from, to};
    }
    if (best.to > from) heap.push(best);
  }

  const KltAllocation& a_;
  std::vector<double> bits_;          // of levels[m]
  std::vector<std::int32_t> places_;  // [coefficients] place in `levels`
};

}  // namespace

double allocate_klt_levels(const KltAllocation& allocation, std::int32_t* chosen) {
  require_allocation(allocation);
  require(chosen != nullptr || allocation.coefficients == 0, "chosen is a null pointer");
  Allocator allocator(allocation);
  if (allocation.bits == KltBits::kEntropy) {
    const double bits = allocator.share(allocation.budget_bits);
    allocator.write(chosen);
    return bits;
  }
  // Rows take a little more than their coefficients: last groups and padding. The largest share whose rows fit is found by
  // halving; then padding is filled.
  double fits = 0.0;
  double exceeds = allocation.budget_bits;
  allocator.share(exceeds);
  if (allocator.row_bits() > allocation.budget_bits) {
    constexpr double kCloseBits = 1.0;
    while (exceeds - fits > kCloseBits) {
      const double middle = 0.5 * (fits + exceeds);
      allocator.share(middle);
      (allocator.row_bits() <= allocation.budget_bits ? fits : exceeds) = middle;
    }
    allocator.share(fits);
  }
  allocator.fill_padding();
  allocator.write(chosen);
  return allocator.row_bits();
}

}  // namespace kvpack
