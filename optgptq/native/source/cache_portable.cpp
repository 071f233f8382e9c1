// Attention over codes for any processor.
#include "cache_attention.hpp"

#define OPTGPTQ_PATH portable
#define OPTGPTQ_VECTOR_BYTES 16
#include "cache_path.hpp"
