package pool

// queue holds the calls that wait, by priority, in order of arrival within one.
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
	c.queued = true
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
	c.next, c.prev, c.queued = nil, nil, false
	if q.first[p] == nil {
		q.used &^= 1 << p
	}
	q.n--
}

// pop takes the most urgent, nil where none waits.
func (q *queue) pop() *call {
	if q.used == 0 {
		return nil
	}
	for p := MaxPriority; p >= 0; p-- {
		if c := q.first[p]; c != nil {
			q.remove(c)
			return c
		}
	}
	return nil
}

// ready holds the workers that can take a task, by how many they have: the one
// that has least comes first, and among equals the one that was busy last,
// whose memory is still warm.
type ready struct {
	first []*worker // by load
	least int       // no worker is in a list below it
	n     int
}

func (r *ready) add(w *worker) {
	w.next, w.prev = r.first[w.load], nil
	if w.next != nil {
		w.next.prev = w
	}
	r.first[w.load] = w
	w.listed = true
	r.least = min(r.least, w.load)
	r.n++
}

func (r *ready) remove(w *worker) {
	if w.prev != nil {
		w.prev.next = w.next
	} else {
		r.first[w.load] = w.next
	}
	if w.next != nil {
		w.next.prev = w.prev
	}
	w.next, w.prev, w.listed = nil, nil, false
	r.n--
}

// best returns the worker that has least, nil where none can take any.
func (r *ready) best() *worker {
	if r.n == 0 {
		r.least = len(r.first)
		return nil
	}
	for r.first[r.least] == nil {
		r.least++
	}
	return r.first[r.least]
}
