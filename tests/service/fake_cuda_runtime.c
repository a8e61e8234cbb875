/* A CUDA runtime without a GPU: memory is the machine's, kernels do nothing, and the rules of recording hold.
 *
 * What is recorded as a graph is one launch afterwards. While one thread records, what another asks of the GPU
 * fails and spoils the recording (cudaStreamCaptureModeGlobal). If the file named by FAKE_CUDA_LOST is there,
 * every wait for the GPU fails with 700, an illegal address, as it does once a GPU is lost. What happens is
 * written to the file named by FAKE_CUDA_LOG, a word a line.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int E;
enum { OK = 0, ILLEGAL_ADDRESS = 700, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_t recorder;
static int is_recording, is_spoilt, n_graphs;

static void tell(const char *what) {
    const char *path = getenv("FAKE_CUDA_LOG");
    FILE *file = path ? fopen(path, "a") : 0;
    if (!file) return;
    fprintf(file, "%s\n", what);
    fclose(file);
}

static int is_lost(void) {
    const char *path = getenv("FAKE_CUDA_LOST");
    return path && !access(path, F_OK);
}

/* Memory, and copies and waits that the host waits for: not while anybody records. */
static E unsafe(const char *what) {
    E error = OK;
    pthread_mutex_lock(&lock);
    if (is_recording) {
        is_spoilt = 1;
        tell(pthread_equal(recorder, pthread_self()) ? "spoilt" : "spoilt by another");
        tell(what);
        error = CAPTURE_UNSUPPORTED;
    }
    pthread_mutex_unlock(&lock);
    return error;
}

struct Properties { /* the beginning of cudaDeviceProp */
    char name[256], uuid[16], luid[8];
    unsigned luid_mask;
    size_t global_memory, shared_memory;
    int registers, warp;
    size_t pitch;
    int threads, threads_dim[3], grid[3];
    size_t constants;
    int major, minor;
    size_t texture, texture_pitch;
    int multiprocessors;
};

E cudaGetDeviceProperties(struct Properties *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "No GPU at all");
    found->global_memory = 16ull << 30;
    found->shared_memory = 48 << 10;
    found->registers = 65536;
    found->warp = 32;
    found->threads = found->threads_dim[0] = found->threads_dim[1] = 1024;
    found->threads_dim[2] = 64;
    found->grid[0] = 0x7fffffff, found->grid[1] = found->grid[2] = 65535;
    found->major = 9;
    found->multiprocessors = 132;
    return OK;
}
E cudaDeviceGetAttribute(int *value, int which, int device) {
    *value = which == 75 ? 9 : which == 76 ? 0 : which == 1 || which == 2 ? 1024 : which == 16 ? 132
        : which == 10 ? 32 : which == 8 ? 48 << 10 : which == 97 ? 227 << 10 : which == 39 ? 2048 : 0;
    return OK;
}
E cudaGetDeviceCount(int *n) { *n = 1; return OK; }
E cudaGetDevice(int *device) { *device = 0; return OK; }
E cudaSetDevice(int device) { return OK; }
E cudaDriverGetVersion(int *version) { *version = 13000; return OK; }
E cudaRuntimeGetVersion(int *version) { *version = 13000; return OK; }
E cudaMemGetInfo(size_t *free_, size_t *total) { *free_ = *total = 16ull << 30; return OK; }

E cudaMalloc(void **at, size_t n) { E e = unsafe("cudaMalloc"); if (!e) *at = calloc(1, n ? n : 1); return e; }
E cudaFree(void *at) {
    usleep(1000); /* as in cudaLaunchKernel */
    E e = unsafe("cudaFree");
    if (!e) free(at);
    return e;
}
E cudaHostAlloc(void **at, size_t n, unsigned flags) { return cudaMalloc(at, n); }
E cudaMallocHost(void **at, size_t n) { return cudaMalloc(at, n); }
E cudaFreeHost(void *at) { return cudaFree(at); }
E cudaMemcpy(void *to, const void *from, size_t n, int kind) {
    E e = unsafe("cudaMemcpy");
    if (e || is_lost()) return e ? e : ILLEGAL_ADDRESS;
    memmove(to, from, n);
    return OK;
}
E cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) { memmove(to, from, n); return OK; }
E cudaMemset(void *at, int value, size_t n) { E e = unsafe("cudaMemset"); if (!e) memset(at, value, n); return e; }
E cudaMemsetAsync(void *at, int value, size_t n, void *stream) { memset(at, value, n); return OK; }
E cudaPointerGetAttributes(int *found, const void *at) { memset(found, 0, 24); found[0] = 2; return OK; }

E cudaStreamCreateWithFlags(void **stream, unsigned flags) { *stream = malloc(1); return OK; }
E cudaStreamCreate(void **stream) { return cudaStreamCreateWithFlags(stream, 0); }
E cudaStreamDestroy(void *stream) { free(stream); return OK; }
E cudaStreamSynchronize(void *stream) { return is_lost() ? ILLEGAL_ADDRESS : unsafe("cudaStreamSynchronize"); }
E cudaDeviceSynchronize(void) { return is_lost() ? ILLEGAL_ADDRESS : unsafe("cudaDeviceSynchronize"); }
E cudaStreamIsCapturing(void *stream, int *status) { *status = is_recording; return OK; }
E cudaStreamBeginCapture(void *stream, int mode) {
    pthread_mutex_lock(&lock);
    recorder = pthread_self();
    is_recording = 1, is_spoilt = mode != 0;
    pthread_mutex_unlock(&lock);
    return OK;
}
E cudaStreamEndCapture(void *stream, void **graph) {
    pthread_mutex_lock(&lock);
    E error = is_spoilt ? CAPTURE_INVALIDATED : OK;
    is_recording = 0;
    *graph = error ? 0 : malloc(1);
    pthread_mutex_unlock(&lock);
    return error;
}
E cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) {
    *executable = malloc(sizeof(int));
    *(int *)*executable = ++n_graphs;
    tell("recorded");
    return OK;
}
E cudaGraphLaunch(void *executable, void *stream) { tell("replayed"); return is_lost() ? ILLEGAL_ADDRESS : OK; }
E cudaGraphDestroy(void *graph) { free(graph); return OK; }
E cudaGraphExecDestroy(void *executable) { free(executable); tell("closed"); return OK; }

E cudaLaunchKernel(void) {
    tell("launched");
    if (is_recording) usleep(2000); /* so that whoever breaks the rules of recording is caught */
    return OK;
}
E __cudaLaunchKernel(void) { return cudaLaunchKernel(); }
E cudaLaunchKernelExC(void) { return cudaLaunchKernel(); }
E cudaLaunchHostFunc(void *stream, void (*run)(void *), void *with) { run(with); return OK; }
unsigned __cudaPushCallConfiguration(void) { return 0; }
E __cudaPopCallConfiguration(int *grid, int *block, size_t *shared, void **stream) {
    grid[0] = grid[1] = grid[2] = block[0] = block[1] = block[2] = 1, *shared = 0, *stream = 0;
    return OK;
}
void **__cudaRegisterFatBinary(void *binary) { static void *one; return &one; }
E cudaEventCreate(void **event) { *event = malloc(1); return OK; }
E cudaEventCreateWithFlags(void **event, unsigned flags) { return cudaEventCreate(event); }
E cudaEventDestroy(void *event) { free(event); return OK; }
E cudaEventElapsedTime(float *ms) { *ms = 1; return OK; }
E cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n) { *n = 1; return OK; }
const char *cudaGetErrorName(E error) { return error ? "cudaErrorOfTheFake" : "cudaSuccess"; }
const char *cudaGetErrorString(E error) {
    return error == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "an error of the fake runtime";
}
E cublasCreate_v2(void **handle) { *handle = malloc(1); return OK; }
E cublasLtCreate(void **handle) { *handle = malloc(1); return OK; }
const char *cublasGetStatusName(E status) { return "CUBLAS_STATUS"; }
const char *cublasGetStatusString(E status) { return "a status"; }

#define NOTHING(name) long name(void) { return 0; }
NOTHING(__cudaGetKernel) NOTHING(__cudaRegisterFatBinaryEnd) NOTHING(__cudaRegisterFunction) NOTHING(__cudaRegisterVar)
NOTHING(__cudaUnregisterFatBinary) NOTHING(cudaEventRecord) NOTHING(cudaEventRecordWithFlags) NOTHING(cudaEventSynchronize)
NOTHING(cudaFreeAsync) NOTHING(cudaFuncGetAttributes) NOTHING(cudaFuncSetAttribute) NOTHING(cudaGetDriverEntryPointByVersion)
NOTHING(cudaGetLastError) NOTHING(cudaKernelSetAttributeForDevice) NOTHING(cudaLaunchCooperativeKernel)
NOTHING(cudaLibraryGetKernel) NOTHING(cudaLibraryLoadData) NOTHING(cudaLibraryUnload) NOTHING(cudaMallocFromPoolAsync)
NOTHING(cudaMemPoolCreate) NOTHING(cudaMemPoolDestroy) NOTHING(cudaMemPoolGetAttribute) NOTHING(cudaMemPoolSetAttribute)
NOTHING(cudaMemPoolTrimTo) NOTHING(cudaMemcpy2DAsync) NOTHING(cudaMemcpyFromSymbol) NOTHING(cudaPeekAtLastError)
NOTHING(cudaStreamWaitEvent) NOTHING(cuTensorMapEncodeTiled)
NOTHING(cublasDestroy_v2) NOTHING(cublasDgeam) NOTHING(cublasDgemmBatched) NOTHING(cublasDgemmStridedBatched)
NOTHING(cublasDgemm_v2) NOTHING(cublasDgetrfBatched) NOTHING(cublasDgetriBatched) NOTHING(cublasGemmBatchedEx)
NOTHING(cublasGemmEx) NOTHING(cublasGemmStridedBatchedEx) NOTHING(cublasGetMathMode) NOTHING(cublasLtDestroy)
NOTHING(cublasLtMatmul) NOTHING(cublasLtMatmulAlgoConfigSetAttribute) NOTHING(cublasLtMatmulAlgoGetHeuristic)
NOTHING(cublasLtMatmulAlgoInit) NOTHING(cublasLtMatmulDescCreate) NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatmulDescSetAttribute) NOTHING(cublasLtMatmulPreferenceCreate) NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatmulPreferenceSetAttribute) NOTHING(cublasLtMatrixLayoutCreate) NOTHING(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatrixLayoutSetAttribute) NOTHING(cublasLtMatrixTransform) NOTHING(cublasLtMatrixTransformDescCreate)
NOTHING(cublasLtMatrixTransformDescDestroy) NOTHING(cublasScopy_v2) NOTHING(cublasSetMathMode) NOTHING(cublasSetStream_v2)
NOTHING(cublasSgeam) NOTHING(cublasSgemmBatched) NOTHING(cublasSgemmStridedBatched) NOTHING(cublasSgemm_v2)
NOTHING(cublasSgetrfBatched) NOTHING(cublasSgetriBatched) NOTHING(cublasSscal_v2)
