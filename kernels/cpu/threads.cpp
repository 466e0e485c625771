// Threads for parallel.h where the compiler has no OpenMP, as Apple's has not.
//
// They stay until the process ends, and sleep while there is nothing to do. Who waits looks for a moment before it sleeps, as
// waking a thread takes as long as a small kernel, and lets other threads go first. A call takes those that are free, so calls
// of several threads at once neither wait for each other nor run on more threads than the largest of them wants, beside their
// own. A process that was forked has none of them: there the calling thread does everything.

#include "parallel.h"

#ifndef _OPENMP

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include <unistd.h>

namespace grcsf {

// What is not atomic and changes belongs to whoever holds the lock of the threads. So does the job's memory at its end: the
// calling thread takes the lock before it leaves.
struct Job {
    void (*work)(const void *of, int number, int size, Job *job);
    const void *of;
    int size = 1;                  // threads
    std::atomic<int> running{0};   // of those that were called, which have not ended
    int arrived = 0;               // threads that wait for the others
    std::atomic<int> meetings{0};  // how often all have come
    std::condition_variable all_here, all_done;
};

namespace {

// Whether something comes true within a moment.
template <class Condition> bool soon(const Condition &condition) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    do {
        if (condition())
            return true;
        std::this_thread::yield();
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

struct Worker {
    std::atomic<Job *> job{nullptr};
    int number = 0;
    bool free = true;
    Worker *next = nullptr;  // of those that a call takes
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
        const auto called = [&] { return me->job.load() != nullptr; };
        for (;;) {
            if (!soon(called)) {
                std::unique_lock<std::mutex> held(lock);
                me->called.wait(held, called);
            }
            Job &job = *me->job.load();
            job.work(job.of, me->number, job.size, &job);
            const std::lock_guard<std::mutex> held(lock);
            me->job = nullptr;
            me->free = true;
            if (!--job.running)
                job.all_done.notify_one();
        }
    }

    // Gives a job as many threads as it wants and as are free.
    void call(Job &job, int threads) {
        const std::lock_guard<std::mutex> held(lock);
        grow(size_t(threads) - 1);
        Worker *taken = nullptr;
        for (Worker *one : all)
            if (job.size < threads && one->free) {
                one->free = false, one->number = job.size++;
                one->next = taken, taken = one;
            }
        job.running = job.size - 1;
        for (; taken; taken = taken->next) {
            taken->job = &job;
            taken->called.notify_one();
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
    if (threads > 1 && workers().process == getpid())
        workers().call(job, threads);
    work(of, 0, job.size, &job);
    if (job.size == 1)
        return;
    const auto done = [&] { return !job.running.load(); };
    soon(done);
    std::unique_lock<std::mutex> held(workers().lock);
    job.all_done.wait(held, done);
}

void meet(Job &job) {
    std::unique_lock<std::mutex> held(workers().lock);
    const int meeting = job.meetings;
    if (++job.arrived == job.size) {
        job.arrived = 0, ++job.meetings;
        job.all_here.notify_all();
        return;
    }
    held.unlock();
    const auto met = [&] { return job.meetings.load() != meeting; };
    if (soon(met))
        return;
    held.lock();
    job.all_here.wait(held, met);
}

}  // namespace grcsf

#endif
