package daemon

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/monitor"
	"github.com/remuda-dev/remuda/supervise"
)

const (
	// restEvery is how often a program that was just started is looked at.
	restEvery = 10 * time.Millisecond
	// restMost is how long a program may be busy before it is believed to be
	// well.
	restMost = time.Second
	// settleMost is how long a caller waits for instances besides their own
	// readiness timeouts.
	settleMost = 15 * time.Second
)

// settle waits until each instance's run that began after begin is ready and
// has come to rest, or has failed, and says what became of it. A program that
// dies in its first moments is reported by the command that started it.
func (d *Daemon) settle(ctx context.Context, list []*instance, begin time.Time) []client.Outcome {
	most := settleMost
	asked := make([]bool, len(list))
	for n, i := range list {
		i.mu.Lock()
		asked[n] = i.want
		most = max(most, settleMost+i.spec.Ready.Timeout.Std()+i.spec.Stop.Grace.Std())
		i.mu.Unlock()
	}
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	arrived := func(st supervise.Status) bool {
		switch st.State {
		case supervise.StateOnline, supervise.StateUnready:
			return !st.Since.Before(begin)
		case supervise.StateStopped, supervise.StateErrored, supervise.StateBackoff:
			return true
		}
		return failedSince(st, begin)
	}
	late := d.await(ctx, list, arrived) != nil
	d.rest(ctx, list, begin)

	out := d.outcomes(list)
	for n, i := range list {
		st, ok := i.sup.Status(i.name)
		if !ok || !d.has(i) {
			out[n].Error = "was deleted meanwhile"
			continue
		}
		i.mu.Lock()
		wanted := i.want
		lastErr := i.lastErr
		i.mu.Unlock()
		switch {
		case wanted:
			out[n].Error = verdict(st, begin, late)
		case asked[n]:
			out[n].Error = "was stopped meanwhile"
		}
		if out[n].Error != "" {
			out[n].LastErr = lastErr
		} else {
			d.clusters.prune(i.app)
		}
	}
	return out
}

// failedSince says whether a run ended by itself after a moment, other than by
// completing its work.
func failedSince(st supervise.Status, begin time.Time) bool {
	e := st.LastExit
	return e != nil && e.At.After(begin) && !asked(e.Cause) && (e.Failed || !st.Completed)
}

func asked(cause string) bool {
	switch client.Verb(cause) {
	case "stop", "up", "rollback", client.VerbStart, client.VerbRestart, client.VerbReload, client.VerbDelete:
		return true
	}
	return strings.HasPrefix(cause, "file changed") || strings.HasPrefix(cause, "cron") || strings.HasPrefix(cause, "memory limit")
}

// verdict says what is wrong with a child that should have come up, "" where
// nothing is. Unless it is late, what is under way is so by another command.
func verdict(st supervise.Status, begin time.Time, late bool) string {
	switch {
	case failedSince(st, begin):
		e := st.LastExit
		how := fmt.Sprintf("exited with code %d", e.Code)
		switch {
		case e.Err != "":
			how = e.Err
		case e.Signal != "":
			how = "was ended by " + e.Signal
		}
		if e.Cause != "" {
			how += " (" + e.Cause + ")"
		}
		if st.State == supervise.StateErrored && st.Reason != "" {
			return how + "; " + st.Reason
		}
		if e.Err == "" && e.At.Sub(begin) < 2*restMost {
			how += " at once"
		}
		return how
	case st.State == supervise.StateErrored:
		return st.Reason
	case late && st.State == supervise.StateStarting:
		return "is not ready yet"
	case late && st.State == supervise.StateWaiting:
		return "waits: " + st.Reason
	}
	return ""
}

// rest waits until the programs without a readiness probe that are online have
// come to rest, ended, or been busy for a second.
func (d *Daemon) rest(ctx context.Context, list []*instance, begin time.Time) {
	var busy []*resting
	for _, i := range list {
		if r := newResting(i, begin); r != nil {
			busy = append(busy, r)
		}
	}
	giveUp := false
	tick := time.NewTicker(restEvery)
	defer tick.Stop()
	for len(busy) > 0 {
		left := busy[:0]
		for _, b := range busy {
			if giveUp || time.Now().After(b.end) || b.settled() {
				b.rest.Close()
				continue
			}
			left = append(left, b)
		}
		busy = left
		if len(busy) == 0 {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			giveUp = true
		}
	}
}

// resting is an instance that is watched until its program has come to rest.
type resting struct {
	run  *run
	end  time.Time // when it is believed to be well, busy or not
	rest *monitor.Rest
}

func newResting(i *instance, begin time.Time) *resting {
	st, ok := i.sup.Status(i.name)
	r, isRun := st.Run.(*run)
	if !ok || !isRun || r == nil || st.State != supervise.StateOnline || st.Since.Before(begin) || r.spec.Ready.Type != "none" {
		return nil
	}
	rest, err := monitor.NewRest(r.proc.ID().PID)
	if err != nil {
		return nil
	}
	return &resting{run: r, end: st.Since.Add(restMost), rest: rest}
}

func (b *resting) settled() bool {
	switch b.rest.Look() {
	case monitor.AtRest:
		return true
	case monitor.Gone:
		// What the supervisor makes of it is worth the moment it takes.
		st, _ := b.run.inst.sup.Status(b.run.inst.name)
		return st.Run != supervise.Run(b.run)
	}
	return false
}

// merged are outcomes of all, with the errors of those that were waited for.
func (d *Daemon) merged(all []*instance, settled []client.Outcome) []client.Outcome {
	out := d.outcomes(all)
	for _, s := range settled {
		for n := range out {
			if out[n].ID == s.ID {
				out[n].Error, out[n].LastErr = s.Error, s.LastErr
			}
		}
	}
	return out
}
