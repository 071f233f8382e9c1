// Attention over codes and their making for one instruction set.
#pragma once

#include "cache_attend.hpp"
#include "cache_store.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {

CachePath cache_path() { return {cache_bytes, attend_cache, store_bytes, store_codes_of, store_groups}; }

}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
