set -e
cd /tmp/cpp/kernels/cpu; mkdir -p /tmp/cppb
INC="$(/work/main/.venv/bin/python -m pybind11 --includes)"
F="-O3 -g0 -std=c++17 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra"
for k in ${1-gcu rcu}; do
g++ $F -march=x86-64-v4 -mprefer-vector-width=512 -DGRCSF_ISA=avx512 -c $k.cpp -o /tmp/cppb/${k}_avx512.o
g++ $F -march=x86-64-v3 -DGRCSF_ISA=avx2 -c $k.cpp -o /tmp/cppb/${k}_avx2.o
g++ $F -DGRCSF_ISA=baseline -c $k.cpp -o /tmp/cppb/${k}_baseline.o
done
g++ $F -DGRCSF_X86 $INC -c bindings.cpp -o /tmp/cppb/bindings.o
g++ -shared -fopenmp -o /tmp/cpp/kernels/_cpu.so /tmp/cppb/*.o
