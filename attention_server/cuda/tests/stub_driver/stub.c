// A stand-in for the NVIDIA driver, libcuda.so.1, for tests on machines without a GPU.
//
// cuDNN builds attention kernels on the CPU for a device that is only described to it, but it insists on a driver that
// accepts the machine code it made. This one accepts it, unseen, and has no device: whatever would touch one fails
// with CUDA_ERROR_NO_DEVICE, as a real driver's calls do on a machine without a GPU.

enum { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_NO_DEVICE = 100 };

// What cuDNN calls to finish a plan. It only keeps the handles, and gives back what it loaded.

static char handle;

int cuLibraryLoadData(void **library, const void *code, void *jit_options, void *jit_values, unsigned jit_count,
                      void *options, void *values, unsigned count) {
  (void)code, (void)jit_options, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)count;
  *library = &handle;
  return CUDA_SUCCESS;
}

int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  (void)library, (void)name;
  *kernel = &handle;
  return CUDA_SUCCESS;
}

// cuDNN 9.25 calls this, 9.19 does not.
int cuKernelGetFunction(void **function, void *kernel) {
  (void)kernel;
  *function = &handle;
  return CUDA_SUCCESS;
}

int cuLibraryUnload(void *library) {
  (void)library;
  return CUDA_SUCCESS;
}

// What cudarc calls to put an error into words.

static int describe(int error, const char **text, const char *no_device) {
  *text = error == CUDA_ERROR_NO_DEVICE ? no_device : 0;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

int cuGetErrorName(int error, const char **text) { return describe(error, text, "CUDA_ERROR_NO_DEVICE"); }

int cuGetErrorString(int error, const char **text) {
  return describe(error, text, "no CUDA-capable device is detected");
}

// What cuDNN looks up when it starts to make code, and does not call: without one of these it makes no plan.
#define LOOKED_UP_BY_CUDNN(X) \
  X(cuCtxPopCurrent) X(cuCtxPushCurrent) X(cuDriverGetVersion) X(cuKernelGetAttribute) X(cuKernelSetAttribute) \
  X(cuLaunchKernelEx) X(cuLibraryLoadFromFile) X(cuLinkAddData) X(cuLinkComplete) X(cuLinkCreate) X(cuLinkDestroy) \
  X(cuStreamGetCtx)

// All else that cudarc 0.19's safe interface calls. cudarc panics at the first call of a function that the driver does
// not have, so each is here, to fail as an error instead. Arguments are ignored, whatever they are: the caller passes
// them in registers and cleans up the stack itself.
#define CALLED_BY_CUDARC(X) \
  X(cuCtxCreate_v3) X(cuCtxCreate_v4) X(cuCtxDestroy_v2) X(cuCtxGetCacheConfig) X(cuCtxGetCurrent) X(cuCtxGetLimit) \
  X(cuCtxGetStreamPriorityRange) X(cuCtxSetCacheConfig) X(cuCtxSetCurrent) X(cuCtxSetFlags) X(cuCtxSetLimit) \
  X(cuCtxSynchronize) X(cuDestroyExternalMemory) X(cuDeviceGet) X(cuDeviceGetAttribute) X(cuDeviceGetCount) \
  X(cuDeviceGetDefaultMemPool) X(cuDeviceGetMemPool) X(cuDeviceGetName) X(cuDeviceGetUuid) X(cuDeviceGetUuid_v2) \
  X(cuDevicePrimaryCtxRelease_v2) X(cuDevicePrimaryCtxRetain) X(cuDeviceSetMemPool) X(cuDeviceTotalMem_v2) \
  X(cuEventCreate) X(cuEventDestroy_v2) X(cuEventElapsedTime) X(cuEventElapsedTime_v2) X(cuEventQuery) \
  X(cuEventRecord) X(cuEventSynchronize) X(cuExternalMemoryGetMappedBuffer) X(cuFuncGetAttribute) \
  X(cuFuncSetAttribute) X(cuFuncSetCacheConfig) X(cuGraphClone) X(cuGraphDestroy) X(cuGraphExecDestroy) \
  X(cuGraphInstantiateWithFlags) X(cuGraphLaunch) X(cuGraphUpload) X(cuImportExternalMemory) X(cuInit) \
  X(cuLaunchCooperativeKernel) X(cuLaunchHostFunc) X(cuLaunchKernel) X(cuMemAdvise_v2) X(cuMemAllocAsync) \
  X(cuMemAllocFromPoolAsync) X(cuMemAllocManaged) X(cuMemAlloc_v2) X(cuMemFreeAsync) X(cuMemFreeHost) X(cuMemFree_v2) \
  X(cuMemGetInfo_v2) X(cuMemHostAlloc) X(cuMemPoolCreate) X(cuMemPoolDestroy) X(cuMemPoolGetAttribute) \
  X(cuMemPoolSetAttribute) X(cuMemPoolTrimTo) X(cuMemPrefetchAsync_v2) X(cuMemcpyDtoDAsync_v2) X(cuMemcpyDtoD_v2) \
  X(cuMemcpyDtoHAsync_v2) X(cuMemcpyDtoH_v2) X(cuMemcpyHtoDAsync_v2) X(cuMemcpyHtoD_v2) X(cuMemcpyPeerAsync) \
  X(cuMemsetD8Async) X(cuMemsetD8_v2) X(cuModuleGetFunction) X(cuModuleGetGlobal_v2) X(cuModuleLoad) \
  X(cuModuleLoadData) X(cuModuleUnload) X(cuOccupancyAvailableDynamicSMemPerBlock) \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessor) X(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags) \
  X(cuOccupancyMaxActiveClusters) X(cuOccupancyMaxPotentialBlockSize) X(cuOccupancyMaxPotentialBlockSizeWithFlags) \
  X(cuOccupancyMaxPotentialClusterSize) X(cuProfilerStart) X(cuProfilerStop) X(cuStreamAttachMemAsync) \
  X(cuStreamBeginCapture_v2) X(cuStreamCreate) X(cuStreamCreateWithPriority) X(cuStreamDestroy_v2) \
  X(cuStreamEndCapture) X(cuStreamIsCapturing) X(cuStreamSynchronize) X(cuStreamWaitEvent)

#define FAIL(name) \
  int name(void) { return CUDA_ERROR_NO_DEVICE; }

LOOKED_UP_BY_CUDNN(FAIL)
CALLED_BY_CUDARC(FAIL)
