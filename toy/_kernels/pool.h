/* A small persistent pool of threads. Only threads.pyx includes this file, so there is one pool in the process.
 *
 * A job is a kernel and a number of slices: the pool calls kernel(args, ith, nth) once for every ith in 0 .. nth-1.
 * What a slice computes depends on (ith, nth) alone, never on which thread runs it or when, so the result always has
 * the same bits. Each thread has a range of the slices of its own, the same part of every job: what it wrote in one
 * op it mostly reads in the next, out of its own cache. A thread that is done with its range takes slices of the
 * others: if a worker is late (the machine is busy, or the worker still wakes up), nobody waits for it.
 *
 * One 64-bit word per thread, its ticket, holds the number of the job, the end of the range, and the next slice. A
 * thread owns a slice when its compare-and-swap of a ticket succeeds; the job's number in the same word is what keeps
 * a late worker from touching a job that is already over.
 *
 * Idle workers spin for a moment, because the next op of a model comes within microseconds, then sleep.
 *
 * Beside other busy programs that is a waste: the workers spin for a caller that has lost its processor, and the caller
 * waits for workers that have lost theirs. A worker that does not come in time is how the caller notices; it then does
 * short jobs by itself for a while, longer each time that nobody came again.
 */
#ifndef TOY_POOL_H
#define TOY_POOL_H

typedef void (*toy_kernel)(void *args, int ith, int nth);

#define TOY_MAX_THREADS 1024
#define TOY_MAX_SLICES 65535 /* they are counted in 16 bits of the ticket */

static void toy_pool_run_serially(toy_kernel kernel, void *args, int nth) {
    for (int ith = 0; ith < nth; ith++) kernel(args, ith, nth);
}

#if defined(_WIN32)

/* No pthreads: every job runs in the thread that asks for it. */
#define TOY_POOL_IS_THREADED 0
static int toy_pool_resize(int n_threads) { (void)n_threads; return 0; }
static int toy_pool_init(void) { return 0; }
static void toy_pool_run(toy_kernel kernel, void *args, int nth) { toy_pool_run_serially(kernel, args, nth); }

#else

#define TOY_POOL_IS_THREADED 1

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#define TOY_SPIN_NS 50000      /* how long an idle worker, or a caller whose slices are gone, spins before it sleeps */
#define TOY_LATE_NS 300000     /* a worker is awake and has come within a fifth of this where a processor is free */
#define TOY_ALONE_NS 1000000   /* how long the caller works alone after a first miss, and at most: 2^8 times that */
#define TOY_STACK (4 << 20)    /* musl's default of 128 kB is less than a BLAS may want */

typedef struct {
    _Alignas(64) _Atomic uint64_t ticket; /* job number << 32 | end of the range << 16 | next slice */
} toy_range;

static struct {
    toy_range ranges[TOY_MAX_THREADS]; /* [0] is the caller's; each on a cache line of its own: its owner polls it */
    _Alignas(64) _Atomic int unfinished;
    _Alignas(64) toy_kernel kernel; /* these change only when every slice of the last job is finished */
    void *args;
    _Atomic int n_ranges;
    int nth;
    _Atomic int busy; /* 1 while a thread is the caller of a job */
    _Atomic int workers_asleep;
    _Atomic int caller_asleep;
    int n_threads; /* wanted, the caller included; guarded by `busy` */
    int n_workers; /* started; guarded by `busy` */
    int64_t missed_since, last_short, alone_until, last_miss, patience; /* nanoseconds, see toy_pool_note; guarded by `busy` */
    int stopping;  /* guarded by `mutex` */
    uint32_t job;  /* number of the last job; guarded by `busy` */
    pthread_mutex_t mutex;
    pthread_cond_t work_to_do, job_done;
    pthread_t workers[TOY_MAX_THREADS];
} toy_pool = {.n_threads = 1, .mutex = PTHREAD_MUTEX_INITIALIZER,
              .work_to_do = PTHREAD_COND_INITIALIZER, .job_done = PTHREAD_COND_INITIALIZER};

static inline void toy_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline int64_t toy_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline int toy_slices_left(uint64_t ticket) { return (int)(ticket >> 16 & 0xffff) - (int)(ticket & 0xffff); }

/* Run the slices that are left in a range -> how many it did. */
static int toy_pool_run_range(toy_range *range) {
    int done = 0;
    uint64_t ticket = atomic_load_explicit(&range->ticket, memory_order_acquire);
    while (toy_slices_left(ticket) > 0) {
        if (!atomic_compare_exchange_weak(&range->ticket, &ticket, ticket + 1)) continue;
        toy_pool.kernel(toy_pool.args, (int)(ticket & 0xffff), toy_pool.nth);
        done++;
        if (atomic_fetch_sub(&toy_pool.unfinished, 1) == 1 && atomic_load(&toy_pool.caller_asleep)) {
            pthread_mutex_lock(&toy_pool.mutex);
            pthread_cond_signal(&toy_pool.job_done);
            pthread_mutex_unlock(&toy_pool.mutex);
        }
        ticket = atomic_load_explicit(&range->ticket, memory_order_acquire);
    }
    return done;
}

static int toy_range_has_work(const toy_range *range) {
    return toy_slices_left(atomic_load_explicit(&range->ticket, memory_order_relaxed)) > 0;
}

static int toy_pool_is_finished(const toy_range *unused) {
    (void)unused;
    return atomic_load_explicit(&toy_pool.unfinished, memory_order_acquire) == 0;
}

/* Take what the other threads have not begun. `n_ranges` may be that of a later job by now: each ticket is checked. */
static int toy_pool_run_others(const toy_range *own) {
    int done = 0;
    for (int i = 0; i < TOY_MAX_THREADS && i < toy_pool.n_ranges; i++)
        if (&toy_pool.ranges[i] != own) done += toy_pool_run_range(&toy_pool.ranges[i]);
    return done;
}

/* Poll for at most TOY_SPIN_NS; the clock is read only now and then. */
static int toy_spin_until(int (*condition)(const toy_range *), const toy_range *range) {
    int64_t deadline = 0;
    for (;;) {
        for (int i = 0; i < 32; i++) {
            if (condition(range)) return 1;
            toy_pause();
        }
        int64_t now = toy_now_ns();
        if (deadline == 0) deadline = now + TOY_SPIN_NS;
        else if (now > deadline) return 0;
    }
}

static void *toy_pool_worker(void *own_range) {
    toy_range *own = own_range;
    for (;;) {
        if (toy_range_has_work(own)) {
            toy_pool_run_range(own);
            toy_pool_run_others(own);
        }
        if (toy_spin_until(toy_range_has_work, own)) continue;
        pthread_mutex_lock(&toy_pool.mutex);
        atomic_fetch_add(&toy_pool.workers_asleep, 1); /* before the last look, so that no job is missed */
        while (toy_slices_left(atomic_load(&own->ticket)) <= 0 && !toy_pool.stopping)
            pthread_cond_wait(&toy_pool.work_to_do, &toy_pool.mutex);
        atomic_fetch_sub(&toy_pool.workers_asleep, 1);
        int stopping = toy_pool.stopping;
        pthread_mutex_unlock(&toy_pool.mutex);
        if (stopping) return 0;
    }
}

static void toy_pool_start_workers(void) {
    pthread_attr_t attributes;
    sigset_t all, before;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, TOY_STACK);
    sigfillset(&all); /* signals (Ctrl-C) belong to Python's threads: workers inherit a mask that blocks them */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (toy_pool.n_workers < toy_pool.n_threads - 1) {
        /* no more threads to be had: the slices are handed out on demand, so fewer workers still do every slice */
        toy_range *range = &toy_pool.ranges[toy_pool.n_workers + 1];
        if (pthread_create(&toy_pool.workers[toy_pool.n_workers], &attributes, toy_pool_worker, range)) break;
        toy_pool.n_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
    pthread_attr_destroy(&attributes);
}

static void toy_pool_stop_workers(void) {
    pthread_mutex_lock(&toy_pool.mutex);
    toy_pool.stopping = 1;
    pthread_cond_broadcast(&toy_pool.work_to_do);
    pthread_mutex_unlock(&toy_pool.mutex);
    for (int i = 0; i < toy_pool.n_workers; i++) pthread_join(toy_pool.workers[i], 0);
    toy_pool.n_workers = 0;
    toy_pool.stopping = 0;
}

/* Notes after a short job whether the workers came for it. They missed when, while short jobs followed each other closely,
 * none of them did a slice for TOY_LATE_NS, or when the caller then waited that much longer than it had worked itself. */
static void toy_pool_note(int64_t start_ns, int64_t own_end_ns, int did_all) {
    const int64_t now = toy_now_ns();
    const int is_close = start_ns - toy_pool.last_short < TOY_SPIN_NS; /* otherwise the workers may sleep, rightly */
    toy_pool.last_short = now;
    if (!did_all) toy_pool.missed_since = 0;
    else if (toy_pool.missed_since == 0 || !is_close) toy_pool.missed_since = start_ns;
    const int was_late = toy_pool.missed_since != 0 && now - toy_pool.missed_since > TOY_LATE_NS && is_close;
    if (!was_late && now - own_end_ns < TOY_LATE_NS + (own_end_ns - start_ns)) return;
    const int again = now - toy_pool.last_miss < 100 * TOY_ALONE_NS + 2 * toy_pool.patience;
    toy_pool.patience = !again ? TOY_ALONE_NS : toy_pool.patience < 256 * TOY_ALONE_NS ? 2 * toy_pool.patience : toy_pool.patience;
    toy_pool.last_miss = now;
    toy_pool.alone_until = now + toy_pool.patience;
    toy_pool.missed_since = 0;
}

static void toy_pool_run(toy_kernel kernel, void *args, int nth) {
    int idle = 0;
    if (nth <= 1 || nth > TOY_MAX_SLICES || !atomic_compare_exchange_strong(&toy_pool.busy, &idle, 1)) {
        /* a second caller at the same time does its slices alone: the same bits, only later */
        toy_pool_run_serially(kernel, args, nth);
        return;
    }
    if (toy_pool.n_workers < toy_pool.n_threads - 1) toy_pool_start_workers();
    /* long jobs are cut finer, see slices_for in threads.pyx; the two halves of a backward are one job, of twice the slices */
    const int is_short = nth <= 2 * toy_pool.n_threads;
    const int64_t start_ns = is_short ? toy_now_ns() : 0;
    if (is_short && start_ns < toy_pool.alone_until) {
        toy_pool_run_serially(kernel, args, nth);
        atomic_store(&toy_pool.busy, 0);
        return;
    }
    const int n_ranges = toy_pool.n_workers + 1;
    toy_pool.kernel = kernel;
    toy_pool.args = args;
    toy_pool.n_ranges = n_ranges;
    toy_pool.nth = nth;
    atomic_store(&toy_pool.unfinished, nth);
    const uint64_t job = (uint64_t)++toy_pool.job << 32;
    for (int i = n_ranges - 1; i >= 0; i--) {
        /* rounded up: the caller, who is there already, has slice 0 even when there are fewer slices than threads */
        const uint64_t start = ((uint64_t)nth * i + n_ranges - 1) / n_ranges;
        const uint64_t end = ((uint64_t)nth * (i + 1) + n_ranges - 1) / n_ranges;
        atomic_store(&toy_pool.ranges[i].ticket, job | end << 16 | start);
    }
    if (atomic_load(&toy_pool.workers_asleep) > 0) {
        pthread_mutex_lock(&toy_pool.mutex);
        pthread_cond_broadcast(&toy_pool.work_to_do);
        pthread_mutex_unlock(&toy_pool.mutex);
    }
    const int own = toy_pool_run_range(&toy_pool.ranges[0]) + toy_pool_run_others(&toy_pool.ranges[0]);
    const int64_t own_end_ns = is_short ? toy_now_ns() : 0;
    if (!toy_spin_until(toy_pool_is_finished, 0)) {
        pthread_mutex_lock(&toy_pool.mutex);
        atomic_store(&toy_pool.caller_asleep, 1); /* before the last look, so that the signal is not missed */
        while (atomic_load(&toy_pool.unfinished) != 0) pthread_cond_wait(&toy_pool.job_done, &toy_pool.mutex);
        atomic_store(&toy_pool.caller_asleep, 0);
        pthread_mutex_unlock(&toy_pool.mutex);
    }
    if (is_short) toy_pool_note(start_ns, own_end_ns, own == nth);
    atomic_store(&toy_pool.busy, 0);
}

/* Set the number of threads, the caller included. Returns -1 if a job is running (try again), 0 when done. */
static int toy_pool_resize(int n_threads) {
    int idle = 0;
    if (!atomic_compare_exchange_strong(&toy_pool.busy, &idle, 1)) return -1;
    if (n_threads - 1 < toy_pool.n_workers) toy_pool_stop_workers();
    toy_pool.n_threads = n_threads; /* missing workers start with the next job */
    atomic_store(&toy_pool.busy, 0);
    return 0;
}

/* After fork() only the forking thread exists in the child: forget the workers, the next job starts new ones. */
static void toy_pool_after_fork_in_child(void) {
    pthread_mutex_init(&toy_pool.mutex, 0);
    pthread_cond_init(&toy_pool.work_to_do, 0);
    pthread_cond_init(&toy_pool.job_done, 0);
    for (int i = 0; i < TOY_MAX_THREADS; i++) atomic_store(&toy_pool.ranges[i].ticket, 0);
    atomic_store(&toy_pool.unfinished, 0);
    atomic_store(&toy_pool.workers_asleep, 0);
    atomic_store(&toy_pool.caller_asleep, 0);
    atomic_store(&toy_pool.busy, 0);
    toy_pool.n_workers = 0;
    toy_pool.stopping = 0;
}

static int toy_pool_init(void) { return pthread_atfork(0, 0, toy_pool_after_fork_in_child); }

#endif
#endif
