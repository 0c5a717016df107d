package pool

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"time"
)

// lookEvery is how often a worker's memory is looked at, at most.
const lookEvery = time.Second

// watchMemory has w's memory looked at soon, and again as long as it has tasks.
// Pool.mu is held.
func (w *worker) watchMemory() {
	if !w.looking {
		w.looking = true
		w.look = time.AfterFunc(lookEvery, w.lookAtMemory)
	}
}

func (w *worker) lookAtMemory() {
	used := w.memory()
	p := w.p
	p.mu.Lock()
	if !w.up {
		w.looking = false
		p.mu.Unlock()
		return
	}
	kill := false
	if limit := p.o.MaxMemory; used > limit {
		p.retire(w)
		switch {
		case w.load == 0:
			p.idle(w)
		case used > limit+limit/2:
			kill = true
		}
	}
	if w.looking = w.load > 0; w.looking {
		w.look = time.AfterFunc(lookEvery, w.lookAtMemory)
	}
	p.mu.Unlock()
	if kill {
		w.Kill(fmt.Sprintf("used %d MB of memory with a task, where %d MB are allowed", used>>20, p.o.MaxMemory>>20))
	}
}

// memory is what w and all processes that come from it hold in memory, in
// bytes.
func (w *worker) memory() (sum int64) {
	pids, err := w.proc.Members()
	if err != nil {
		return 0 // it ends, or the next look knows more
	}
	for _, pid := range pids {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
		if err != nil {
			continue // it has ended
		}
		if f := bytes.Fields(b); len(f) > 1 {
			if n, err := strconv.ParseInt(string(f[1]), 10, 64); err == nil {
				sum += n * int64(os.Getpagesize())
			}
		}
	}
	return sum
}
