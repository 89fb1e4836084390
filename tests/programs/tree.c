// Processes that change what they have mapped all the time: tree MIB STATUS
//
// Four processes, of which each forks, moves, unmaps and gives back memory in turns, and checks every page that it has. Each
// writes to STATUS.0 to STATUS.3 how many turns it has made, and how many pages were wrong.
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define PARTS 8

static uint64_t pages;
// Parts of the memory: each can be moved, be zero, or be away.
static struct part {
	char *at;
	int is_zero;
} parts[PARTS];

static uint64_t expected(int part, uint64_t page) {
	return parts[part].is_zero ? 0 : (part * 1000003 + page + 1) * 0x9E3779B97F4A7C15ull;
}

static uint64_t wrong_in(int part) {
	uint64_t wrong = 0;
	for (uint64_t page = 0; parts[part].at && page < pages; page++)
		wrong += *(volatile uint64_t *)(parts[part].at + page * PAGE + (page % 512) * 8) != expected(part, page);
	return wrong;
}

static void *busy(void *part) {
	// Of a part that stays where it is.
	for (;;) {
		if (wrong_in((int)(intptr_t)part)) abort();
		usleep(1000);
	}
}

static void turns(int process, const char *status) {
	char path[4096];
	snprintf(path, sizeof path, "%s.%d", status, process);
	// A file that is mapped, and not open: one that is open for a moment could be dumped at that moment.
	int file = open(path, O_CREAT | O_RDWR, 0666);
	if (ftruncate(file, 4096)) exit(1);
	volatile uint64_t *words = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	close(file);
	pthread_t thread;
	pthread_create(&thread, 0, busy, (void *)(intptr_t)(PARTS - 1));
	uint64_t wrong = 0;
	for (uint64_t turn = 0;; turn++) {
		// The last part is the thread's.
		int part = (turn * 5 + process) % (PARTS - 1);
		size_t length = pages * PAGE;
		switch (turn % 5) {
		case 0: {
			pid_t child = fork();
			if (child == 0) {
				uint64_t found = 0;
				for (int i = 0; i < PARTS; i++) found += wrong_in(i);
				// A child of the child sees the same.
				pid_t grandchild = fork();
				if (grandchild == 0) {
					madvise(parts[PARTS - 1].at, length, MADV_DONTNEED);
					for (int i = 0; i < PARTS - 1; i++) found += wrong_in(i);
					_exit(found != 0);
				}
				int result;
				waitpid(grandchild, &result, 0);
				_exit(found != 0 || result != 0);
			}
			int result;
			if (child < 0 || waitpid(child, &result, 0) < 0 || result != 0) wrong++;
			break;
		}
		case 1:
			if (parts[part].at) {
				char *to = mmap(0, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
				parts[part].at = mremap(parts[part].at, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to);
			}
			break;
		case 2:
			if (parts[part].at && turn % 3 == 0) {
				madvise(parts[part].at, length, MADV_DONTNEED);
				parts[part].is_zero = 1;
			}
			break;
		case 3:
			if (turn % 7 == 0 && parts[part].at) {
				munmap(parts[part].at, length);
				parts[part].at = 0;
			} else if (!parts[part].at) {
				parts[part].at = mmap(0, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
				parts[part].is_zero = 1;
			}
			break;
		case 4:
			wrong += wrong_in(part);
		}
		words[1] = wrong;
		words[0] = turn + 1;
		usleep(3000);
	}
}

int main(int argc, char **argv) {
	pages = (strtoull(argv[1], 0, 10) << 20) / PAGE / PARTS;
	for (int part = 0; part < PARTS; part++) {
		parts[part].at = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		for (uint64_t page = 0; page < pages; page++)
			for (int i = 0; i < 512; i++)
				*(uint64_t *)(parts[part].at + page * PAGE + i * 8) = expected(part, page);
	}
	for (int process = 1; process < 4; process++)
		if (fork() == 0) turns(process, argv[2]);
	// A child that nobody waits for: a zombie.
	if (fork() == 0) _exit(3);
	turns(0, argv[2]);
}
