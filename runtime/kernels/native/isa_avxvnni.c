/* The operators with AVX-VNNI: Intel's client processors since the 12th generation, small ones such as N100, Zen 5. */

#include "kernels.h"

#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define TARGET __attribute__((target("avx2,fma,avxvnni")))
#define DPBUSD _mm256_dpbusd_avx_epi32
#include "isa_avxvnni.h"

/* __builtin_cpu_supports does not know it everywhere. */
static int runs_here(void) {
  unsigned a = 0, b, c, d;
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid_count(7, 1, &a, &b, &c, &d) &&
         (a >> 4 & 1) != 0;
}

const Isa isa_avxvnni = {"avx-vnni", runs_here, &INT8, &INT4, &ROWS, attention};
#else
#include "isa.h"

static int runs_here(void) { return 0; } /* the compiler does not know its instruction */

const Isa isa_avxvnni = {"avx-vnni", runs_here, NULL, NULL, NULL, NULL};
#endif
