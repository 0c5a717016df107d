package pool

import "time"

// queue holds calls that wait, by priority, in order of arrival within one.
type queue struct {
	first, last [MaxPriority + 1]*call
	used        uint16 // a bit for each priority that has any
	n           int
}

func (q *queue) push(c *call) { q.insert(c, false) }

// pushFront is for a call that had its turn before.
func (q *queue) pushFront(c *call) { q.insert(c, true) }

func (q *queue) insert(c *call, front bool) {
	p := c.task.Priority
	c.in = q
	c.next, c.prev = nil, nil
	switch {
	case q.first[p] == nil:
		q.first[p], q.last[p] = c, c
	case front:
		c.next = q.first[p]
		c.next.prev = c
		q.first[p] = c
	default:
		c.prev = q.last[p]
		c.prev.next = c
		q.last[p] = c
	}
	q.used |= 1 << p
	q.n++
}

func (q *queue) remove(c *call) {
	p := c.task.Priority
	if c.prev != nil {
		c.prev.next = c.next
	} else {
		q.first[p] = c.next
	}
	if c.next != nil {
		c.next.prev = c.prev
	} else {
		q.last[p] = c.prev
	}
	c.next, c.prev, c.in = nil, nil, nil
	if q.first[p] == nil {
		q.used &^= 1 << p
	}
	q.n--
}

// peek returns the most urgent, nil where none waits. With ageing above 0 a
// call counts one priority more for each time of that length that it has
// waited; of those that count the same, the one that came first.
func (q *queue) peek(now func() time.Time, ageing time.Duration) *call {
	if q.used == 0 {
		return nil
	}
	var best *call
	for p := MaxPriority; p >= 0; p-- {
		c := q.first[p]
		switch {
		case c == nil:
		case ageing == 0:
			return c
		case best == nil:
			best = c
		default:
			best = moreUrgent(best, c, now(), ageing)
		}
	}
	return best
}

// moreUrgent returns the one of two that is to go first, either of which may be
// nil.
func moreUrgent(a, b *call, now time.Time, ageing time.Duration) *call {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	}
	pa, pb := a.urgency(now, ageing), b.urgency(now, ageing)
	if pb > pa || pb == pa && b.asked.Before(a.asked) {
		return b
	}
	return a
}

// urgency is the priority to which c has risen.
func (c *call) urgency(now time.Time, ageing time.Duration) int {
	if ageing == 0 {
		return c.task.Priority
	}
	return min(c.task.Priority+int(min(now.Sub(c.asked)/ageing, MaxPriority)), MaxPriority)
}

// oldest returns when the call that has waited for longest came, false where
// none waits.
func (q *queue) oldest() (at time.Time, ok bool) {
	for _, c := range q.first {
		if c != nil && (!ok || c.asked.Before(at)) {
			at, ok = c.asked, true
		}
	}
	return at, ok
}

// lowest returns the newest of the lowest priority, nil where none waits that
// is below.
func (q *queue) lowest(below int) *call {
	for _, c := range q.last[:below] {
		if c != nil {
			return c
		}
	}
	return nil
}
