/* What isa_avxvnni.c has, with the same instruction as AVX512-VNNI encodes it: so that processors without AVX-VNNI can
   test and time what those with it run. Only EMBEDGE_KERNELS=avx-vnni chooses it. */

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512vl,avx512vnni")))
#define DPBUSD _mm256_dpbusd_epi32
#include "isa_avxvnni.h"

static int runs_here(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

const Isa isa_avxvnni_evex = {"avx-vnni", runs_here, &INT8, &INT4, &ROWS, attention};
