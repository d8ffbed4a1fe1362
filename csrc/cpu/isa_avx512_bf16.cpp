#define T2T_ISA T2T_AVX512_BF16
#include "isa.h"

#ifdef T2T_X86_KERNELS
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#include "kernels.h"

const t2t::Kernels t2t::kAvx512Bf16 = t2t::make_kernels("avx512_bf16");
#endif
