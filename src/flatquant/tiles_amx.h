// The eight tile registers of AMX, as everything here uses them. Included inside a region compiled for AMX.

namespace kvpack::amx {
namespace {

inline constexpr std::int64_t kRowBytes = 64;  // of any tile

/// All eight tiles are 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

/// Configures the tiles of this thread for the life of the object; other libraries configure theirs in every call too.
class TileScope {
 public:
  TileScope() { _tile_loadconfig(&config_); }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  TileConfig config_;
};

}  // namespace
}  // namespace kvpack::amx
