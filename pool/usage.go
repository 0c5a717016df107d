package pool

import "time"

// usage adds up how long workers were up and how long they had tasks, over all
// workers: two workers that are busy for a second make two seconds. What it
// says of now is true, nothing ticks.
type usage struct {
	at       time.Time // of the last change
	busy, up int       // workers that have a task; that are up
	busyTime time.Duration
	upTime   time.Duration
}

// change books that so many more, or fewer, workers are busy and up from now on.
func (u *usage) change(now time.Time, busy, up int) {
	u.advance(now)
	u.busy += busy
	u.up += up
}

// advance brings the sums up to now.
func (u *usage) advance(now time.Time) {
	// Callers read the clock before or after others that hold the lock.
	if d := now.Sub(u.at); d > 0 {
		if !u.at.IsZero() {
			u.busyTime += d * time.Duration(u.busy)
			u.upTime += d * time.Duration(u.up)
		}
		u.at = now
	}
}
