// Paged attention for any processor.
#include "paged_attention.hpp"

#define OPTGPTQ_PATH portable
#define OPTGPTQ_VECTOR_BYTES 16
#include "paged_attention_path.hpp"
