// Loops whose rounds several threads share: OpenMP's threads, or those of threads.cpp where the compiler has no OpenMP.
//
// Which thread does which round depends on the numbers of rounds and threads alone, but for each_when_free().
#pragma once

#include <cstddef>

#ifdef _OPENMP
#include <omp.h>
#else
namespace grcsf {
struct Job;
void run_in_threads(int threads, void (*work)(const void *of, int number, int size, Job *job), const void *of);
void meet(Job &job);
}  // namespace grcsf
#endif

namespace {

// A thread of those that do one thing together.
struct Team {
    int number, size;
#ifndef _OPENMP
    grcsf::Job *job;
#endif

    // Waits until all of them are here.
    void meet() const {
        if (size < 2)
            return;
#ifdef _OPENMP
#pragma omp barrier
#else
        grcsf::meet(*job);
#endif
    }

    // Calls body(i) for this thread's part of [0, count). If there are fewer rounds than threads, the first threads have one.
    template <class Body> void share(ptrdiff_t count, const Body &body) const {
        const ptrdiff_t each = count / size, more = count % size;
        const ptrdiff_t first = number * each + (number < more ? number : more);
        const ptrdiff_t last = first + each + (number < more ? 1 : 0);
        for (ptrdiff_t i = first; i < last; ++i)
            body(i);
    }
};

// Calls body(team) in `threads` threads, or in fewer if there are no more. Each has a copy of the body: what that holds by value
// can stay in registers.
template <class Body> void in_parallel(int threads, const Body &body) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    {
        const Body own = body;
        own(Team{omp_get_thread_num(), omp_get_num_threads()});
    }
#else
    const auto work = [](const void *of, int number, int size, grcsf::Job *job) {
        const Body own = *static_cast<const Body *>(of);
        own(Team{number, size, job});
    };
    grcsf::run_in_threads(threads, work, &body);
#endif
}

// Calls body(i, number of the thread) for i in [0, count), in parts of the same size.
template <class Body> void each(int threads, ptrdiff_t count, const Body &body) {
    in_parallel(threads, [=](const Team &team) {
        team.share(count, [&](ptrdiff_t i) { body(i, team.number); });
    });
}

// Likewise, for rounds that take different times: a thread takes the next one when it has done its last.
template <class Body> void each_when_free(int threads, ptrdiff_t count, const Body &body) {
    ptrdiff_t next = 0;
    in_parallel(threads, [=, &next](const Team &team) {
        // No std::atomic: see simd.h on inline functions.
        for (ptrdiff_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;)
            body(i, team.number);
    });
}

}  // namespace
