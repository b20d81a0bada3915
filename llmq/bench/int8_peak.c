/* Multiply-adds of 8-bit integers a second that this CPU does on registers alone: int8_peak THREADS ROW.
   Prints "<instruction> <operations a second>", a multiply-add being two operations. Inline assembly, so that nothing is
   optimized away; compiled by llmq/bench/machine.py when a benchmark runs. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

enum { STEPS = 20000000, CHAINS = 8 };

#if defined(__x86_64__)
/* Eight independent chains hide the latency; operands 14 and 15 stay as they are. */
#define EACH(op)                                                                                     \
  op("0") op("1") op("2") op("3") op("4") op("5") op("6") op("7")
#define ZMM(r) "vpdpbusd %%zmm14, %%zmm15, %%zmm" r "\n\t"
#define YMM(r) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" r "\n\t"
/* Without VNNI: products of two bytes summed to 16 bits, and one addition of these. The least that a kernel can do. */
#define AVX2(r) "vpmaddubsw %%ymm14, %%ymm15, %%ymm13\n\tvpaddw %%ymm13, %%ymm" r ", %%ymm" r "\n\t"
#define CLOBBER "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm13", "xmm14", "xmm15"

static void zmm(void) {
  for (int i = 0; i < STEPS; ++i) __asm__ volatile(EACH(ZMM)::: CLOBBER);
}
static void ymm(void) {
  for (int i = 0; i < STEPS; ++i) __asm__ volatile(EACH(YMM)::: CLOBBER);
}
static void avx2(void) {
  for (int i = 0; i < STEPS; ++i) __asm__ volatile(EACH(AVX2)::: CLOBBER);
}
static const struct Row {
  const char* name;
  void (*run)(void);
  double macs;
} rows[] = {{"avx512_vnni:vpdpbusd", zmm, 64}, {"avx_vnni:vpdpbusd", ymm, 32}, {"avx2:vpmaddubsw+vpaddw", avx2, 32}};
#elif defined(__aarch64__)
#define SDOT(r) "sdot v" r ".4s, v14.16b, v15.16b\n\t"
#define EACH(op) op("0") op("1") op("2") op("3") op("4") op("5") op("6") op("7")
static void sdot(void) {
  for (int i = 0; i < STEPS; ++i)
    __asm__ volatile(".arch_extension dotprod\n\t" EACH(SDOT)::: "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7");
}
static const struct Row {
  const char* name;
  void (*run)(void);
  double macs;
} rows[] = {{"asimddp:sdot", sdot, 16}};
#endif

static const struct Row* chosen;

static void* work(void* unused) {
  chosen->run();
  return unused;
}

int main(int argc, char** argv) {
  int threads = argc > 2 ? atoi(argv[1]) : 1, row = argc > 2 ? atoi(argv[2]) : 0;
  pthread_t ids[1024];
  if (threads < 1 || threads > 1024 || row < 0 || row >= (int)(sizeof rows / sizeof rows[0])) return 2;
  chosen = &rows[row];
  double best = 0;
  for (int turn = 0; turn < 4; ++turn) {
    double start = seconds();
    for (int i = 0; i < threads; ++i) pthread_create(&ids[i], 0, work, 0);
    for (int i = 0; i < threads; ++i) pthread_join(ids[i], 0);
    double rate = 2.0 * chosen->macs * CHAINS * STEPS * threads / (seconds() - start);
    if (rate > best) best = rate;
  }
  printf("%s %.4g\n", chosen->name, best);
  return 0;
}
