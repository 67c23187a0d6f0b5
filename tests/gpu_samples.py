"""Output of Nvidia's tools, shortened."""

RAW = """\
==PROF== Connected to process 4242 (/usr/bin/python3.11)
==PROF== Profiling "layer_norm_silu_forward" - 0: 0%....50%....100% - 2 passes
{"kind": "once"}
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum","launch__registers_per_thread",\
"sm__throughput.avg.pct_of_peak_sustained_elapsed","sm__warps_active.avg.pct_of_peak_sustained_active"
"","","","","","","","","","","","%","ns","register/thread","%","%"
"0","4242","python3.11","127.0.0.1","layer_norm_silu_forward","1","7","(128, 1, 1)","(256, 1, 1)","0","9.0",\
"60.00","2,000","40","20.00","50.00"
"1","4242","python3.11","127.0.0.1","void at::native::vectorized_elementwise_kernel<4, float>(int, float)","1","7",\
"(128, 1, 1)","(9, 1, 1)","0","9.0","10.00","1,500.50","16","5.00","n/a"
"2","4242","python3.11","127.0.0.1","layer_norm_silu_forward","1","7","(128, 1, 1)","(256, 1, 1)","0","9.0",\
"90.00","6,000","40","40.00","70.00"
==WARNING== Note: Running with uncontrolled GPU caches.
"""
FORBIDDEN = """\
==PROF== Connected to process 9 (/usr/bin/python3.11)
==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters on device 0.
==PROF== Disconnected from process 9
"""
MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at two_hot_forward+0x170 in two_hot.py:36
=========     by thread (0,0,0) in block (1,0,0)
=========     Address 0x7f6f3ec00001 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========     Host Frame: [0x2df3f2]
=========
========= Invalid __global__ write of size 4 bytes
=========     at 0x160 in two_hot.py:36:two_hot_forward(float*)
=========     by thread (1,0,0) in block (1,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at observe_forward+0x100 in rssm.py:26
=========     and Read access at observe_forward+0x230 in rssm.py:29 [16 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
BROKEN_LINES = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at
=========     race_condition(float *)+0xb0 in demo.cu:28
=========     and Read access at
=========     race_condition(float *)+0xc0 in demo.cu:30
=========     [1024 hazards]
=========
========= Error: Race reported between Write access at 0x68 in sgemm_nt
=========     and Read access at 0x78 in sgemm_nt [20 hazards]
=========
========= Invalid __global__ read of size 2 bytes
=========     at void at::native::copy_kernel<float>(int, float *)+0x90
=========     by thread (65,0,0) in block (0,0,0)
=========
========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)
"""
NO_CALLS = """\
========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
========= Tracking kernels launched by child processes requires the --target-processes all option.
"""
