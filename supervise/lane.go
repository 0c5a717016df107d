package supervise

import "sync"

// lane carries out jobs in the order they come, at most limit at a time, on
// goroutines that exist only while there is work.
type lane struct {
	limit int

	mu   sync.Mutex
	busy int
	jobs []*job
}

type job struct {
	do   func()
	over bool // returned, or written off
}

func (l *lane) submit(do func()) *job {
	j := &job{do: do}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy < l.limit {
		l.busy++
		go l.work(j)
	} else {
		l.jobs = append(l.jobs, j)
	}
	return j
}

func (l *lane) work(j *job) {
	for j != nil {
		j.do()
		l.mu.Lock()
		if j.over { // its place was given to another meanwhile
			l.mu.Unlock()
			return
		}
		j.over = true
		j = l.next()
		l.mu.Unlock()
	}
}

// next takes the next job, or gives the place back and returns nil.
func (l *lane) next() *job {
	if len(l.jobs) == 0 {
		l.jobs = nil
		l.busy--
		return nil
	}
	j := l.jobs[0]
	l.jobs[0] = nil
	l.jobs = l.jobs[1:]
	return j
}

// writeOff gives the place of a job that hangs to the next in the line.
func (l *lane) writeOff(j *job) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if j.over {
		return
	}
	j.over = true
	if n := l.next(); n != nil {
		go l.work(n)
	}
}
