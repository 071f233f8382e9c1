// The inner loops for any processor: vectors of 16 bytes, which the compiler turns into what there is.
#define OPTGPTQ_PATH portable
#define OPTGPTQ_VECTOR_BYTES 16
#include "binary_path.hpp"
#include "panel_tile.hpp"
#include "refine_tile.hpp"
#include "refit_tile.hpp"
#include "sweep_tile.hpp"
#include "tile.hpp"
