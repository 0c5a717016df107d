package pool

import (
	"fmt"
	"math"
	"time"
)

// Bottleneck is what a pool is held up by.
type Bottleneck string

// The bottlenecks.
const (
	Idle             Bottleneck = "idle"              // nothing was asked of the pool
	StartBound       Bottleneck = "startup_bound"     // tasks wait for workers that are not there yet
	IPCBound         Bottleneck = "ipc_bound"         // messages take longer than the work
	WorkersSaturated Bottleneck = "workers_saturated" // tasks wait for workers that are all busy
	QueueStarved     Bottleneck = "queue_starved"     // workers wait for tasks
	Balanced         Bottleneck = "balanced"          // none of these
)

// String returns the bottleneck in words.
func (b Bottleneck) String() string {
	switch b {
	case StartBound:
		return "worker start-up bound"
	case IPCBound:
		return "IPC bound"
	case WorkersSaturated:
		return "workers saturated"
	case QueueStarved:
		return "queue starved"
	}
	return string(b)
}

// Verdict says what a pool is held up by, judged by [Recent]. The first of these
// rules that applies counts:
//
//	idle               no task ended, ran or waited
//	startup_bound      missing ≥ 25 %, waiting ≥ 25 %
//	ipc_bound          overhead ≥ 50 %, handling ≤ 50 %, utilization ≥ 50 %
//	workers_saturated  utilization ≥ 80 %, waiting ≥ 50 %; or waiting ≥ 50 % and
//	                   tasks wait for the workers of their keys just now
//	queue_starved      utilization < 50 %, waiting < 10 %
//	balanced           always
type Verdict struct {
	Bottleneck Bottleneck `json:"bottleneck"`
	// Reason is one line: the bottleneck in words and the figures that tell it.
	Reason string `json:"reason"`
	Advice string `json:"advice,omitempty"` // what to change; "": nothing
}

// Recent is what became of a pool's time lately, over 10 to 20 seconds, or since
// its start. Shares are from 0 to 1.
type Recent struct {
	Span time.Duration `json:"span_ns"`
	// Utilization is the share of the workers' places (Options.Concurrency each)
	// that tasks had.
	Utilization float64 `json:"utilization"`
	// Missing is the share of the time of all workers that there shall be in
	// which they neither had nor took tasks: they started, ended or waited for
	// their next start.
	Missing float64 `json:"missing"`
	// Waiting is the share of the time in which at least one task waited.
	Waiting float64 `json:"waiting"`
	// Overhead is the share of the tasks' time on workers that was not their
	// handlers' own; Handling is the share of the time of busy workers that was,
	// at most 1. Both count tasks only whose workers tell (IPC.Count).
	Overhead float64 `json:"overhead"`
	Handling float64 `json:"handling"`

	Bytes    uint64 `json:"bytes_per_task"` // of a task and its result together, on average
	Died     uint64 `json:"died"`           // workers that ended without being asked to
	Recycled uint64 `json:"recycled"`       // workers replaced by MaxTasks, MaxAge or MaxMemory

	// Wait, Run, IPC and Start are as in Stats.
	Wait  Times `json:"wait"`
	Run   Times `json:"run"`
	IPC   Times `json:"ipc"`
	Start Times `json:"start"`
}

// setting is what a verdict's advice is about.
type setting struct {
	size, least, most int // workers
	concurrency       int
	spares            int
	processors        int
	protocol          Protocol
	under             bool   // tasks run or wait
	keyed             bool   // tasks wait for the workers of their keys
	broken            string // why no worker can be started; "": one can
}

func judge(r Recent, s setting) Verdict {
	v := Verdict{}
	say := func(b Bottleneck, format string, args ...any) {
		v.Bottleneck, v.Reason = b, b.String()+": "+fmt.Sprintf(format, args...)
	}
	switch {
	case r.Run.Count == 0 && !s.under && r.Utilization == 0 && r.Waiting == 0 && s.broken == "":
		say(Idle, "no task in the last %s", round(r.Span))
	case s.broken != "":
		say(StartBound, "no worker can be started: %s", s.broken)
		v.Advice = "see why the workers do not start: run their command by hand"
	case r.Missing >= 0.25 && r.Waiting >= 0.25:
		started := "no worker got ready in the last " + round(r.Span).String()
		if r.Start.Count > 0 {
			started = fmt.Sprintf("%s got ready in the last %s, each in %s", workers(int(r.Start.Count)), round(r.Span), round(r.Start.Mean()))
		}
		say(StartBound, "%s of the workers' time was not there for tasks, which waited %s of the time; %s",
			percent(r.Missing), percent(r.Waiting), started)
		v.Advice = s.startAdvice(r)
	case r.IPC.Count > 0 && r.Overhead >= 0.5 && r.Handling <= 0.5 && r.Utilization >= 0.5:
		handler := r.Run.Mean() - r.IPC.Mean()
		say(IPCBound, "of %s that a task was on a worker its handler took %s; workers computed %s of the time that they had tasks",
			round(r.Run.Mean()), round(max(handler, 0)), percent(r.Handling))
		v.Advice = "put more work into each task"
		if r.Bytes >= 64<<10 {
			v.Advice = fmt.Sprintf("move less than the %d KiB of each task and result: send names of files, or Files", r.Bytes>>10)
		}
		if s.concurrency == 1 && s.protocol == Frames {
			v.Advice += ", or raise Concurrency from 1 to 8 so that messages overlap"
		}
	case r.Utilization >= 0.8 && r.Waiting >= 0.5:
		say(WorkersSaturated, "%s of the places of %s were taken; tasks waited %s for %s of work",
			percent(r.Utilization), workers(s.size), round(r.Wait.Mean()), round(r.Run.Mean()))
		v.Advice = s.moreWorkers()
	case s.keyed && r.Waiting >= 0.5:
		say(WorkersSaturated, "tasks waited %s of the time, for the workers of their keys, while %s of the places of %s were free",
			percent(r.Waiting), percent(1-r.Utilization), workers(s.size))
		v.Advice = "spread Task.Key over more values, or leave it empty where any worker will do"
	case r.Utilization < 0.5 && r.Waiting < 0.1:
		say(QueueStarved, "%s of the places of %s were free, and tasks waited %s of the time",
			percent(1-r.Utilization), workers(s.size), percent(r.Waiting))
		v.Advice = s.moreTasks(r)
	default:
		say(Balanced, "%s of the places of %s were taken; tasks waited %s of the time, %s for %s of work",
			percent(r.Utilization), workers(s.size), percent(r.Waiting), round(r.Wait.Mean()), round(r.Run.Mean()))
	}
	return v
}

func (s setting) startAdvice(r Recent) string {
	spare := fmt.Sprintf("raise Spares from %d to %d, so that started workers stand by", s.spares, max(2*s.spares, 1))
	switch {
	case r.Start.Count == 0 && r.Span >= turnTime:
		return "see what the workers do before they are ready"
	case r.Died > r.Recycled && 2*r.Died >= r.Start.Count:
		return fmt.Sprintf("see why workers die: %s did", workers(int(r.Died)))
	case 2*r.Recycled >= r.Start.Count && r.Recycled > 0:
		return fmt.Sprintf("%s recycled: raise MaxTasks, MaxAge or MaxMemory, or %s", workers(int(r.Recycled)), spare)
	case s.size < s.most || s.least < s.most:
		return fmt.Sprintf("raise Min from %d, or %s", s.least, spare)
	}
	return "it may pass, as the pool has just started; otherwise " + spare
}

func (s setting) moreWorkers() string {
	if s.size < s.most {
		return fmt.Sprintf("nothing yet: the pool has %d of up to %s and grows", s.size, workers(s.most))
	}
	name, to := "Size", 2*s.size
	if s.least < s.most {
		name = "Max"
	}
	advice := fmt.Sprintf("raise %s from %d to %d", name, s.size, to)
	if to > s.processors {
		advice += fmt.Sprintf("; where tasks compute rather than wait, more than the %d processors do not help", s.processors)
	}
	return advice
}

func (s setting) moreTasks(r Recent) string {
	advice := "submit more tasks at a time"
	// So many would be busy for three quarters of the time.
	enough := max(int(math.Ceil(float64(s.size)*r.Utilization/0.75)), 1)
	switch {
	case enough >= s.size || s.size > s.least: // an elastic pool shrinks by itself
	case s.least < s.most:
		advice += fmt.Sprintf(", or lower Min from %d to %d", s.least, enough)
	default:
		advice += fmt.Sprintf(", or lower Size from %d to %d", s.size, enough)
	}
	return advice
}

func workers(n int) string {
	if n == 1 {
		return "1 worker"
	}
	return fmt.Sprintf("%d workers", n)
}

func percent(f float64) string { return fmt.Sprintf("%.0f %%", 100*f) }

// round leaves three digits or so.
func round(d time.Duration) time.Duration {
	unit := time.Duration(1)
	for d/unit >= 1000 {
		unit *= 10
	}
	return d.Round(unit)
}
