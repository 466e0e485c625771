// A program of test_own_threads.py: loops of parallel.h over the threads of threads.cpp, ended by the first that is wrong.

#include "parallel.h"

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

namespace {

void expect(bool right, const char *what) {
    if (right)
        return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::_Exit(1);
}

// Each round once, by a thread that there is; without atomic numbers, so that a race would be found.
void check_rounds(int threads, ptrdiff_t count) {
    for (int way = 0; way < 2; ++way) {
        std::vector<int> times(size_t(count), 0), of(size_t(threads), 0);
        const auto body = [&](ptrdiff_t i, int thread) {
            expect(thread >= 0 && thread < threads, "number of a thread");
            ++times[size_t(i)], ++of[size_t(thread)];
        };
        way ? each_when_free(threads, count, body) : each(threads, count, body);
        ptrdiff_t total = 0;
        for (int number : of)
            total += number;
        expect(total == count, "rounds of the threads");
        for (int number : times)
            expect(number == 1, "times of a round");
    }
}

// After a meeting every thread sees what the others did before it.
void check_meetings(int threads, int rounds) {
    std::vector<ptrdiff_t> written(size_t(threads), -1);
    in_parallel(threads, [&](const Team &team) {
        for (int round = 0; round < rounds; ++round) {
            written[size_t(team.number)] = round;
            team.meet();
            for (int other = 0; other < team.size; ++other)
                expect(written[size_t(other)] == round, "what another thread wrote");
            team.meet();
        }
    });
}

void check_everything() {
    for (int threads : {1, 2, 3, 8})
        for (ptrdiff_t count : {0, 1, 2, 7, 1000})
            check_rounds(threads, count);
    for (int threads : {1, 2, 5})
        check_meetings(threads, 50);
}

int size_of(int threads) {
    int size = 0;
    in_parallel(threads, [&](const Team &team) {
        if (!team.number)
            size = team.size;
    });
    return size;
}

}  // namespace

int main() {
    check_everything();
    expect(size_of(1) == 1 && size_of(4) == 4 && size_of(2) == 2, "threads that were asked for");
    // Calls that come from several threads at once.
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller)
        callers.emplace_back([] {
            for (int time = 0; time < 20; ++time)
                check_everything();
        });
    for (std::thread &caller : callers)
        caller.join();
    expect(size_of(8) == 8, "threads that are free again");
    // A child has none of the threads, and would wait for them forever.
    const pid_t child = fork();
    if (!child) {
        expect(size_of(8) == 1, "threads of a child");
        check_everything();
        std::_Exit(0);
    }
    int status = 0;
    expect(waitpid(child, &status, 0) == child && !status, "the child");
    return 0;  // with the threads asleep
}
