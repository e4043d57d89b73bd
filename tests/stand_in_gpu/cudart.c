/* CUDA's runtime and driver, as far as torch asks them, on a machine that has no GPU: memory is the
   host's, what is queued is done at once, and a kernel that is launched ends the program.

   The names and signatures are those of CUDA 12; only the first words of each answer matter. */
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Error;
typedef void *Handle;
enum { NO_DEVICE = 100, OUT_OF_MEMORY = 2 };

static int device;
static size_t used;

/* OVERTURE_STAND_IN_MIB says how much memory a GPU has, otherwise 80 GiB. */
static size_t memory(void) {
  const char *mebibytes = getenv("OVERTURE_STAND_IN_MIB");
  return mebibytes ? (size_t)atol(mebibytes) << 20 : (size_t)80 << 30;
}

static Error made(Handle *handle) {
  *handle = malloc(8);
  return 0;
}

/* OVERTURE_STAND_IN_GPUS says how many there are, CUDA_VISIBLE_DEVICES how many may be seen. */
Error cudaGetDeviceCount(int *count) {
  const char *there = getenv("OVERTURE_STAND_IN_GPUS"), *seen = getenv("CUDA_VISIBLE_DEVICES");
  *count = there ? atoi(there) : 1;
  if (seen) {
    *count = *seen && *seen != '-';
    for (; *seen && *count; seen++)
      *count += *seen == ',';
  }
  return *count ? 0 : NO_DEVICE;
}
Error cudaGetDevice(int *number) { *number = device; return 0; }
Error cudaSetDevice(int number) { device = number; return 0; }
Error cudaDriverGetVersion(int *version) { *version = 12060; return 0; }
Error cudaMemGetInfo(size_t *left, size_t *all) {
  *all = memory();
  *left = *all - used;
  return 0;
}

/* Offsets of cudaDeviceProp: totalGlobalMem, warpSize, maxThreadsPerBlock, major, processors. */
Error cudaGetDeviceProperties_v2(char *found, int number) {
  memset(found, 0, 1032);
  strcpy(found, "stand-in");
  *(size_t *)(found + 288) = memory();
  *(int *)(found + 308) = 32;
  *(int *)(found + 320) = 1024;
  *(int *)(found + 360) = 9;
  *(int *)(found + 388) = 132;
  return 0;
}

Error cudaHostAlloc(void **at, size_t bytes, unsigned flags) {
  *at = aligned_alloc(512, (bytes + 511) / 512 * 512);
  return *at ? 0 : OUT_OF_MEMORY;
}
Error cudaFreeHost(void *at) { free(at); return 0; }
Error cudaMalloc(void **at, size_t bytes) {
  if (used + bytes > memory() || cudaHostAlloc(at, bytes, 0))
    return OUT_OF_MEMORY;
  used += malloc_usable_size(*at);
  return 0;
}
Error cudaFree(void *at) {
  used -= malloc_usable_size(at);
  free(at);
  return 0;
}
Error cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
  memmove(to, from, bytes);
  return 0;
}
Error cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, Handle stream) {
  return cudaMemcpy(to, from, bytes, kind);
}
Error cudaMemsetAsync(void *to, int value, size_t bytes, Handle stream) {
  memset(to, value, bytes);
  return 0;
}
Error cudaPointerGetAttributes(int *found, const void *at) { memset(found, 0, 24); return 0; }

Error cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return 0;
}
Error cudaStreamCreateWithPriority(Handle *stream, unsigned flags, int priority) {
  return made(stream);
}
Error cudaStreamCreateWithFlags(Handle *stream, unsigned flags) { return made(stream); }
Error cudaStreamGetPriority(Handle stream, int *priority) { *priority = 0; return 0; }
Error cudaStreamIsCapturing(Handle stream, int *is) { *is = 0; return 0; }
Error cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
Error cudaEventCreateWithFlags(Handle *event, unsigned flags) { return made(event); }
Error cudaEventElapsedTime(float *milliseconds, Handle from, Handle to) {
  *milliseconds = 0;
  return 0;
}
#define DONE(name) Error name(void) { return 0; }
DONE(cudaGetLastError)
DONE(cudaPeekAtLastError)
DONE(cudaDeviceSynchronize)
DONE(cudaStreamQuery)
DONE(cudaStreamSynchronize)
DONE(cudaStreamWaitEvent)
DONE(cudaStreamDestroy)
DONE(cudaEventRecord)
DONE(cudaEventRecordWithFlags)
DONE(cudaEventQuery)
DONE(cudaEventSynchronize)
DONE(cudaEventDestroy)
DONE(cudaHostRegister)
DONE(cudaHostUnregister)
const char *cudaGetErrorString(Error error) { return "of the stand-in"; }

Error cudaLaunchKernel(void) {
  fputs("stand-in: a kernel was launched, by an operator that no Python answers for\n", stderr);
  abort();
}

/* Of the driver, which torch opens by its own name. */
Error cuDevicePrimaryCtxGetState(int number, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}
Error cuInit(unsigned flags) { return 0; }
Error cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }
Error cuGetErrorString(Error error, const char **text) {
  *text = cudaGetErrorString(error);
  return 0;
}
