#define T2T_ISA T2T_PORTABLE
#include "isa.h"

#include "kernels.h"

const t2t::Kernels t2t::kPortable = t2t::make_kernels("portable");
