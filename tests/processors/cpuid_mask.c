/* Runs a program as on an older x86-64 processor, at full speed.

   The CPUID instruction is made to fault (arch_prctl ARCH_SET_CPUID) and is answered with instruction sets left out. Works on Linux where
   /proc/cpuinfo lists cpuid_fault: Intel, and AMD from Zen 4 on. Virtual machines often hide it. There, libraries that faulting_cpuid.py
   copied fault by themselves: they have CE A2, which is no instruction, in place of CPUID's 0F A2. CPUID_FAULTS says so.

     gcc -O2 -shared -fPIC -o cpuid_mask.so cpuid_mask.c -ldl
     CPUID_MASK=avx2 LD_PRELOAD=$PWD/cpuid_mask.so python -m pytest

   CPUID_MASK   left out
   avx2         AVX-512, AVX-VNNI, AMX
   avx512       VNNI and what came with or after it
   vnni         BF16, FP16 and AMX

   Only programs that ask are fooled: the instructions still run, and the C library has chosen its own functions before. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { SET_CPUID = 0x1012 };
enum { EAX, EBX, ECX, EDX };

typedef int Sigaction(int, const struct sigaction *, struct sigaction *);

static struct sigaction others; /* what the program wants to be called on a real fault */
static Sigaction *real_sigaction;
static int patched; /* whether only copied libraries fault */
static int level;   /* 0: AVX2, 1: AVX-512 without VNNI, 2: with it */

static uint32_t bit(int n) { return UINT32_C(1) << n; }

static void masked(uint32_t leaf, uint32_t sub, uint32_t r[4]) {
  if (leaf == 7 && sub == 0) {
    const uint32_t avx512_b = bit(16) | bit(17) | bit(21) | bit(28) | bit(30) | bit(31);
    const uint32_t vnni_c = bit(1) | bit(6) | bit(11) | bit(12) | bit(14); /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
    if (level < 1) r[EBX] &= ~avx512_b;
    if (level < 2) r[ECX] &= ~vnni_c;
    if (level < 1) r[EDX] &= ~(bit(2) | bit(3) | bit(8));
    r[EDX] &= ~(bit(22) | bit(23) | bit(24) | bit(25)); /* AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8 */
  }
  if (leaf == 7 && sub == 1) {
    r[EAX] &= ~(bit(5) | bit(21) | bit(23)); /* AVX512-BF16, AMX-FP16, AVX-IFMA */
    if (level < 2) r[EAX] &= ~bit(4);        /* AVX-VNNI */
    r[EDX] &=
        ~(bit(4) | bit(5) | bit(8) | bit(10) | bit(19)); /* AVX-VNNI-INT8, NE-CONVERT, AMX-COMPLEX, -INT16, AVX10 */
  }
  if (leaf == 0xd && sub == 0 && level < 1) r[EAX] &= ~(bit(5) | bit(6) | bit(7));
  if (leaf == 0xd && sub == 0) r[EAX] &= ~(bit(17) | bit(18));
}

static void on_fault(int number, siginfo_t *info, void *context) {
  greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *at = (const uint8_t *)g[REG_RIP];
  if (at[1] == 0xa2 && (patched ? at[0] == 0xce : info->si_code == SI_KERNEL && at[0] == 0x0f)) {
    const uint32_t leaf = (uint32_t)g[REG_RAX], sub = (uint32_t)g[REG_RCX];
    uint32_t r[4];
    if (!patched) syscall(SYS_arch_prctl, SET_CPUID, 1);
    __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(sub));
    if (!patched) syscall(SYS_arch_prctl, SET_CPUID, 0);
    masked(leaf, sub, r);
    g[REG_RAX] = r[EAX], g[REG_RBX] = r[EBX], g[REG_RCX] = r[ECX], g[REG_RDX] = r[EDX];
    g[REG_RIP] += 2;
    return;
  }
  if (others.sa_flags & SA_SIGINFO && others.sa_sigaction) {
    others.sa_sigaction(number, info, context);
  } else if (others.sa_handler != SIG_DFL && others.sa_handler != SIG_IGN) {
    others.sa_handler(number);
  } else {
    struct sigaction plain = {.sa_handler = SIG_DFL};
    real_sigaction(number, &plain, NULL);
  }
}

int sigaction(int number, const struct sigaction *wanted, struct sigaction *before) {
  if (!real_sigaction) real_sigaction = (Sigaction *)dlsym(RTLD_NEXT, "sigaction");
  if (number != (patched ? SIGILL : SIGSEGV)) return real_sigaction(number, wanted, before);
  if (before) *before = others;
  if (wanted) others = *wanted;
  return 0;
}

sighandler_t signal(int number, sighandler_t handler) {
  struct sigaction wanted = {.sa_handler = handler, .sa_flags = SA_RESTART}, before;
  sigemptyset(&wanted.sa_mask);
  return sigaction(number, &wanted, &before) ? SIG_ERR : before.sa_handler;
}

__attribute__((constructor(101))) static void start(void) {
  const char *name = getenv("CPUID_MASK");
  if (!name) return;
  level = strcmp(name, "vnni") == 0 ? 2 : strcmp(name, "avx512") == 0 ? 1 : strcmp(name, "avx2") == 0 ? 0 : -1;
  if (level < 0) {
    fprintf(stderr, "CPUID_MASK is %s; expected avx2, avx512 or vnni\n", name);
    _exit(2);
  }
  patched = getenv("CPUID_FAULTS") != NULL;
  real_sigaction = (Sigaction *)dlsym(RTLD_NEXT, "sigaction");
  /* On the stack of whoever asks: alternate ones, which Rust and Python set up, may be too small for the registers of AVX-512. */
  struct sigaction mine = {.sa_flags = SA_SIGINFO | SA_NODEFER, .sa_sigaction = on_fault};
  sigemptyset(&mine.sa_mask);
  real_sigaction(patched ? SIGILL : SIGSEGV, &mine, NULL);
  if (!patched && syscall(SYS_arch_prctl, SET_CPUID, 0)) {
    fprintf(stderr,
            "CPUID_MASK: this processor or kernel cannot let CPUID fault (no cpuid_fault in /proc/cpuinfo); run "
            "make test-as-%s, which copies libraries that do\n",
            name);
    _exit(2);
  }
}
