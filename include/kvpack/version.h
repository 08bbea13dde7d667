// Version of the library and of its C ABI.
#pragma once

#define KVPACK_VERSION_MAJOR 0
#define KVPACK_VERSION_MINOR 1
#define KVPACK_VERSION_PATCH 0
#define KVPACK_VERSION "0.1.0"

/// Raised whenever a structure or a function of c_abi.h changes; the Python side refuses another number.
#define KVPACK_ABI_VERSION 5
