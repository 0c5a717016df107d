package cli

import (
	"hash/maphash"
	"time"

	"github.com/remuda-dev/remuda/client"
)

// historyLines bounds what a follower remembers of one stream of one instance.
const historyLines = 4096

// resume lets a follower go on after a loss of the daemon without a line
// twice. Having reconnected, it asks again for a little more than it missed,
// and each stream's lines are held against those it saw last: the longest run
// of them that ends at the last one is what comes again.
//
// The zero value is ready to use. It is for one goroutine.
type resume struct {
	last    time.Time // of the newest line seen
	since   time.Time // nothing older is to be shown, whatever comes again
	seed    maphash.Seed
	seeded  bool
	streams map[streamKey]*stream
}

type streamKey struct {
	id     int
	stream string
}

type stream struct {
	seen []remembered // the newest last
	// After a reconnection, until it is known where the stream goes on:
	matching bool
	from     int // index in seen of the first line that came again
	again    []client.LogLine
}

type remembered struct {
	hash uint64
	at   time.Time
}

// reconnected tells that lines may come again from now on.
func (r *resume) reconnected() {
	for _, s := range r.streams {
		s.matching, s.from, s.again = len(s.seen) > 0, 0, nil
	}
}

// pass takes a line and returns those that are to be shown now.
func (r *resume) pass(l client.LogLine) []client.LogLine {
	if !r.seeded {
		r.seed, r.seeded, r.streams = maphash.MakeSeed(), true, map[streamKey]*stream{}
	}
	key := streamKey{l.ID, l.Stream}
	s := r.streams[key]
	if s == nil {
		s = &stream{}
		r.streams[key] = s
	}
	if len(s.seen) == 0 && l.Time.Before(r.since) {
		return nil
	}
	if !s.matching {
		r.remember(s, l)
		return []client.LogLine{l}
	}
	// s.again is, without this line, the same as seen[from:from+len(again)].
	s.again = append(s.again, l)
	for {
		if len(s.again) == 1 {
			s.from = r.first(s, s.again[0])
		}
		for s.from < len(s.seen) && !r.fits(s) {
			s.from++
		}
		if s.from < len(s.seen) || !s.again[0].Time.Before(s.seen[0].at.Add(slack)) {
			break
		}
		// What was seen began later (--lines 2): this stood before it.
		if s.again = s.again[1:]; len(s.again) == 0 {
			return nil
		}
		s.from = r.first(s, s.again[0])
	}
	// Where from has reached the end, nothing of it was seen before.
	shared := len(s.seen) - s.from
	if len(s.again) < shared {
		return nil
	}
	fresh := s.again[shared:]
	if shared == len(s.again) {
		// All that was seen has come; what follows is new.
		s.matching, s.again = false, nil
		return nil
	}
	s.matching, s.again = false, nil
	for _, f := range fresh {
		r.remember(s, f)
	}
	return fresh
}

// first is where in what was seen the first line that comes again may be: at
// its very time, else not long before it.
func (r *resume) first(s *stream, l client.LogLine) int {
	hash := maphash.String(r.seed, l.Text)
	for k, m := range s.seen {
		if m.hash == hash && m.at.Equal(l.Time) {
			return k
		}
	}
	k := 0
	for k < len(s.seen) && s.seen[k].at.Before(l.Time.Add(-slack)) {
		k++
	}
	return k
}

// fits says whether what came again is what was seen from s.from on.
func (r *resume) fits(s *stream) bool {
	for k, l := range s.again {
		if s.from+k >= len(s.seen) {
			return true
		}
		if s.seen[s.from+k].hash != maphash.String(r.seed, l.Text) {
			return false
		}
	}
	return true
}

func (r *resume) remember(s *stream, l client.LogLine) {
	if l.Time.After(r.last) {
		r.last = l.Time
	}
	if len(s.seen) == historyLines {
		s.seen = append(s.seen[:0], s.seen[historyLines/2:]...)
	}
	s.seen = append(s.seen, remembered{maphash.String(r.seed, l.Text), l.Time})
}
