#define T2T_ISA T2T_AVX2
#include "isa.h"

#ifdef T2T_X86_KERNELS
#pragma GCC target("arch=x86-64-v3")
#include "kernels.h"

const t2t::Kernels t2t::kAvx2 = t2t::make_kernels("avx2");
#endif
