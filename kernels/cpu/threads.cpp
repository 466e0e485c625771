// Threads for parallel.h where the compiler has no OpenMP, as Apple's has not.
//
// They sleep until they are called, and stay until the process ends. A call takes those that are free, so calls of several
// threads at once neither wait for each other nor run on more threads than the largest of them wants, beside their own.
// A process that was forked has none of them: there the calling thread does everything.

#include "parallel.h"

#ifndef _OPENMP

#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include <unistd.h>

namespace grcsf {

// All of it, but for what never changes, is read and written by whoever holds the lock of the threads.
struct Job {
    void (*work)(const void *of, int number, int size, Job *job);
    const void *of;
    int size = 1, running = 0;       // threads, and those of them that have been called and have not ended
    int arrived = 0, meetings = 0;  // threads that wait for the others, and how often all have come
    std::condition_variable all_here, all_done;
};

namespace {

struct Worker {
    Job *job = nullptr;  // null: free
    int number = 0;
    std::condition_variable called;
};

struct Workers {
    std::mutex lock;
    std::vector<Worker *> all;
    const pid_t process = getpid();

    void grow(size_t wanted) {
        try {
            all.reserve(wanted);
            while (all.size() < wanted) {
                auto *const worker = new Worker;
                try {
                    std::thread(&Workers::serve, this, worker).detach();
                } catch (...) {
                    delete worker;
                    throw;
                }
                all.push_back(worker);
            }
        } catch (const std::system_error &) {  // the system gives no more threads
        } catch (const std::bad_alloc &) {
        }
    }

    void serve(Worker *me) {
        std::unique_lock<std::mutex> held(lock);
        for (;;) {
            me->called.wait(held, [&] { return me->job; });
            Job &job = *me->job;
            const int size = job.size;
            held.unlock();
            job.work(job.of, me->number, size, &job);
            held.lock();
            me->job = nullptr;
            if (!--job.running)
                job.all_done.notify_one();  // the job is there until the lock is free
        }
    }
};

// Never destroyed: the threads use it until the process has ended.
Workers &workers() {
    static Workers &all = *new Workers;
    return all;
}

}  // namespace

void run_in_threads(int threads, void (*work)(const void *of, int number, int size, Job *job), const void *of) {
    Job job{};
    job.work = work, job.of = of;
    if (threads < 2) {
        work(of, 0, 1, &job);
        return;
    }
    Workers &those = workers();
    if (those.process == getpid()) {
        const std::lock_guard<std::mutex> held(those.lock);
        those.grow(size_t(threads) - 1);
        for (Worker *one : those.all)
            if (job.size < threads && !one->job) {
                one->job = &job, one->number = job.size++;
                one->called.notify_one();
            }
        job.running = job.size - 1;
    }
    work(of, 0, job.size, &job);
    if (job.size == 1)
        return;
    std::unique_lock<std::mutex> held(those.lock);
    job.all_done.wait(held, [&] { return !job.running; });
}

void meet(Job &job) {
    std::unique_lock<std::mutex> held(workers().lock);
    const int meeting = job.meetings;
    if (++job.arrived == job.size) {
        job.arrived = 0, ++job.meetings;
        job.all_here.notify_all();
    } else {
        job.all_here.wait(held, [&] { return job.meetings != meeting; });
    }
}

}  // namespace grcsf

#endif
