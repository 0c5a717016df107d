'use strict'
// Worker side of the frames protocol (docs/worker-protocol.md) for Node.js 18
// and newer. No dependencies.
//
//   const { serve } = require('./remuda-worker.cjs')
//   serve({ thumbnail: async (task) => { …; return { width, height } } })
//
// serve is enough for most workers; open is for those that publish and subscribe
// outside of tasks too.

const net = require('node:net')

const VERSION = 1
const HEADER = 12
const MAX_FRAME = 64 << 20
const T = { HELLO: 1, TASK: 2, RESULT: 3, ERROR: 4, PROGRESS: 5, CHUNK: 6, CANCEL: 7, PING: 8, PONG: 9, STOP: 10, HANDLES: 11, SUBSCRIBE: 12, UNSUBSCRIBE: 13, PUBLISH: 14 }
const MAX_TOOK = 0xffffff // microseconds in a header
const HANDLE_WAIT = 10_000 // milliseconds for a task's handles to come
const SLOW = { 'drop-oldest': 0, 'drop-newest': 1, disconnect: 2 }

/** A failure with a code for programs. */
class TaskError extends Error {
  constructor (message, code, data) {
    super(message)
    this.name = 'TaskError'
    this.code = code
    this.data = data
  }
}

/** What there is to do. */
class Task {
  #server
  #id
  #controller
  #handles = []
  #taken = false
  constructor (server, id, name, body) {
    this.#server = server
    this.#id = id
    this.name = name
    /** The task as bytes. */
    this.body = body
  }

  /** The task as JSON; null where it is empty. */
  get data () {
    return this.body.length === 0 ? null : JSON.parse(this.body.toString())
  }

  /** An AbortSignal that fires when the answer is not wanted any more. */
  get signal () {
    return this._abort().signal
  }

  /**
   * What came along: connections and pipes to read from as net.Socket, listeners
   * as net.Server, UDP sockets as dgram.Socket. A handler that has looked at this
   * must close them; else they are closed at its end.
   */
  get handles () {
    this.#taken = true
    return this.#handles
  }

  _give (handles) {
    this.#handles = handles
  }

  _done () {
    if (!this.#taken) this.#handles.forEach(discard)
  }

  _abort () {
    this.#controller ??= new AbortController()
    return this.#controller
  }

  _cancel () {
    this._abort().abort(new TaskError('cancelled', 'cancelled'))
  }

  /** Tells whoever waits how far the task is. */
  progress (value) {
    this.#server.send(T.PROGRESS, this.#id, encode(value))
  }

  /** Sends a piece of the result ahead of the rest. */
  chunk (value) {
    this.#server.send(T.CHUNK, this.#id, encode(value))
  }

  /** Gives a message to all who have subscribed to topic; waits for none. */
  publish (topic, value) {
    this.#server.publish(topic, value)
  }
}

/** Something that was published. */
class Message {
  constructor (topic, body, missed) {
    this.topic = topic
    /** The message as bytes. */
    this.body = body
    /** How many were dropped since the one before, as this worker was slow. */
    this.missed = missed
  }

  /** The message as JSON; null where it is empty. */
  get data () {
    return this.body.length === 0 ? null : JSON.parse(this.body.toString())
  }
}

function topicBytes (topic, pattern) {
  const b = Buffer.from(String(topic))
  if (b.length === 0 || b.length > 255 || (!pattern && b[b.length - 1] === 0x2a)) {
    throw new TypeError(`${JSON.stringify(topic)} is no topic${pattern ? '' : ' to publish to'}`)
  }
  return b
}

const EMPTY = Buffer.alloc(0)

function discard (handle) {
  if (typeof handle.destroy === 'function') handle.destroy()
  else handle.close()
}

// Whether a is later than b, ids going round at 2**32.
function later (a, b) {
  return ((a - b) | 0) > 0
}

/** The handles of tasks, which come over Node's own channel, in any order. */
class Handles {
  constructor () {
    this.last = 0 // the latest task that has come
    this.of = new Map() // by the ids of tasks: { handles, missing, timer, ready }
    this.take = (m, handle) => {
      const [id, i, server] = Array.isArray(m?.remuda) ? m.remuda : []
      if (typeof id !== 'number' || !handle) return
      const e = this.entry(id)
      if (!e) { // its task was given up
        discard(handle)
        return
      }
      e.handles[i] = { handle, server }
      e.come++
      this.check(e)
    }
    process.on('message', this.take)
    process.channel.unref() // it is the other channel that keeps a worker
  }

  entry (id) {
    let e = this.of.get(id)
    if (!e && later(id, this.last)) this.of.set(id, e = { handles: [], come: 0 })
    return e
  }

  expect (id, n) {
    const e = this.entry(id)
    if (e) e.want = n
  }

  // Calls ready with a task's handles when they have come, with an error where
  // they do not; at once where there are none.
  await (id, ready) {
    const e = this.of.get(id)
    this.last = later(id, this.last) ? id : this.last
    if (!e?.want) {
      ready()
      return
    }
    e.ready = (err) => {
      this.of.delete(id)
      clearTimeout(e.timer)
      ready(err, e.handles)
    }
    e.timer = setTimeout(() => this.drop(id, new TaskError(`${e.want - e.come} handles did not come`, 'handles')), HANDLE_WAIT)
    this.check(e)
  }

  check (e) {
    if (e.ready && e.come >= e.want) e.ready()
  }

  // A task that is not there any more, or never came.
  drop (id, err) {
    this.last = later(id, this.last) ? id : this.last
    const e = this.of.get(id)
    if (!e) return
    this.of.delete(id)
    for (const h of e.handles) if (h) discard(h.handle)
    e.handles = []
    e.ready?.(err)
  }

  end () {
    process.removeListener('message', this.take)
    for (const id of this.of.keys()) this.drop(id, new TaskError('the worker ends', 'cancelled'))
  }
}

// A listener comes bare, so that nobody is accepted before the handler looks.
function usable ({ handle, server }) {
  return server ? net.createServer().listen(handle) : handle
}

function report (err) {
  console.error('remuda: a subscriber failed:', err)
}

// Bytes stay as they are, everything else becomes JSON.
function encode (value) {
  if (value === undefined) return EMPTY
  if (Buffer.isBuffer(value)) return value
  if (ArrayBuffer.isView(value)) return Buffer.from(value.buffer, value.byteOffset, value.byteLength)
  return Buffer.from(JSON.stringify(value) ?? 'null')
}

class Server {
  constructor (socket, handlers, done) {
    this.socket = socket
    this.handlers = handlers
    this.done = done
    this.tasks = new Map()
    this.subscribers = new Map() // by topic, sets of functions
    this.chunks = []
    this.size = 0
    this.greeted = false
    this.stopping = false
    this.corked = false
    this.peerMax = MAX_FRAME
    this.uncork = () => { this.corked = false; this.socket.uncork() }
    socket.on('data', (b) => {
      try {
        this.read(b)
      } catch (err) {
        this.end(err)
      }
    })
    socket.on('error', () => this.end())
    socket.on('close', () => this.end())
    // The pool has asked for the end before, and now does so for the last time.
    this.term = () => {
      this.stopping = true
      for (const t of this.tasks.values()) t._cancel()
      this.idle()
    }
    process.on('SIGTERM', this.term)
    if (process.channel && typeof process.send === 'function') this.handles = new Handles()
    const hello = { remuda: VERSION, max_frame: MAX_FRAME, pid: process.pid, sdk: 'node ' + process.versions.node, handles: !!this.handles }
    this.send(T.HELLO, 0, encode(hello))
  }

  // Answers of one turn of the event loop go out in one system call.
  send (type, id, payload, took = 0) {
    if (this.socket.destroyed) return
    if (payload.length > this.peerMax) {
      throw new TaskError(`${payload.length} bytes are more than the ${this.peerMax} that the parent takes`, 'too_large')
    }
    const small = payload.length < 4096
    const b = Buffer.allocUnsafe(HEADER + (small ? payload.length : 0))
    b.writeUInt32LE(payload.length, 0)
    b.writeUInt32LE((type | took << 8) >>> 0, 4)
    b.writeUInt32LE(id, 8)
    if (!this.corked) {
      this.corked = true
      this.socket.cork()
      setImmediate(this.uncork)
    }
    if (small) {
      payload.copy(b, HEADER)
      this.socket.write(b)
    } else {
      this.socket.write(b)
      this.socket.write(payload)
    }
  }

  read (data) {
    if (this.size > 0) {
      this.chunks.push(data)
      this.size += data.length
      if (this.size < this.need) return
      data = Buffer.concat(this.chunks, this.size)
      this.chunks = []
      this.size = 0
    }
    let at = 0
    for (;;) {
      const left = data.length - at
      let need = HEADER
      if (left >= HEADER) {
        const n = data.readUInt32LE(at)
        const type = data[at + 4]
        if (n > MAX_FRAME + 2048) throw new Error(`frame of ${n} bytes`)
        need = HEADER + n
        if (left >= need) {
          this.frame(type, data.readUInt32LE(at + 8), data.subarray(at + HEADER, at + need))
          at += need
          continue
        }
      }
      if (left > 0) {
        this.chunks = [data.subarray(at)]
        this.size = left
        this.need = need
      }
      return
    }
  }

  frame (type, id, b) {
    if (!this.greeted && type !== T.HELLO) throw new Error(`first frame is of type ${type}, not HELLO`)
    switch (type) {
      case T.HELLO: {
        const h = JSON.parse(b.toString())
        if (h.remuda !== VERSION) throw new Error(`the parent speaks version ${h.remuda} of the protocol, this SDK version ${VERSION}`)
        this.peerMax = h.max_frame || MAX_FRAME
        this.greeted = true
        return
      }
      case T.TASK: {
        if (b.length < 6) throw new Error('short task')
        const n = b.readUInt16LE(4)
        if (6 + n > b.length) throw new Error('short task')
        const task = new Task(this, id, b.toString('utf8', 6, 6 + n), b.subarray(6 + n))
        this.tasks.set(id, task)
        if (this.handles) this.handles.await(id, (err, handles) => this.begin(id, task, err, handles))
        else this.run(id, task)
        return
      }
      case T.HANDLES:
        if (!this.handles) throw new Error('handles for a worker that takes none')
        this.handles.expect(id, b.length)
        return
      case T.CANCEL:
        this.tasks.get(id)?._cancel()
        this.handles?.drop(id, new TaskError('cancelled', 'cancelled'))
        return
      case T.PING:
        this.send(T.PONG, id, Buffer.from(b))
        return
      case T.PONG:
        return
      case T.PUBLISH:
        this.published(id, b)
        return
      case T.STOP:
        this.stopping = true
        this.idle()
        return
      default:
        if (type < 128) throw new Error(`unexpected frame of type ${type}`)
    }
  }

  begin (id, task, err, handles) {
    if (err) {
      task._began = performance.now()
      this.fail(id, err)
      return
    }
    if (handles) {
      try {
        task._give(handles.map(usable))
      } catch (err) {
        task._began = performance.now()
        this.fail(id, err)
        return
      }
    }
    this.run(id, task)
  }

  run (id, task) {
    task._began = performance.now()
    try {
      const h = this.handlers[task.name] ?? this.handlers['']
      if (typeof h !== 'function') {
        throw new TaskError(`this worker has no handler for the task ${JSON.stringify(task.name)}`, 'unknown_task')
      }
      const r = h(task)
      if (typeof r?.then === 'function') {
        r.then((v) => this.answer(id, v), (err) => this.fail(id, err))
      } else {
        this.answer(id, r)
      }
    } catch (err) {
      this.fail(id, err)
    }
  }

  answer (id, value) {
    try {
      this.send(T.RESULT, id, encode(value), this.took(id))
    } catch (err) { // not JSON, or too large
      this.fail(id, err)
      return
    }
    this.over(id)
  }

  over (id) {
    this.tasks.get(id)._done()
    this.tasks.delete(id)
    this.idle()
  }

  fail (id, err) {
    const e = { message: String(err?.message ?? err) }
    if (err?.code !== undefined) e.code = String(err.code)
    else if (err?.name === 'AbortError') e.code = 'cancelled'
    if (err?.data !== undefined) e.data = err.data
    let b
    try {
      b = encode(e)
    } catch {
      b = encode({ message: e.message })
    }
    if (b.length > this.peerMax) b = encode({ message: 'the error is too large to be sent' })
    this.send(T.ERROR, id, b, this.took(id))
    this.over(id)
  }

  // Microseconds since the handler was called; 0 would say nothing.
  took (id) {
    const us = Math.round((performance.now() - this.tasks.get(id)._began) * 1000)
    return Math.min(Math.max(us, 1), MAX_TOOK)
  }

  publish (topic, value) {
    const t = topicBytes(topic, false)
    const body = encode(value)
    this.send(T.PUBLISH, 0, Buffer.concat([Buffer.of(t.length), t, body]))
  }

  subscribe (topic, call, slow = 'drop-oldest') {
    if (typeof call !== 'function') throw new TypeError('a subscriber must be a function')
    if (!(slow in SLOW)) throw new TypeError(`${JSON.stringify(slow)} is none of ${Object.keys(SLOW).join(', ')}`)
    const t = topicBytes(topic, true)
    this.send(T.SUBSCRIBE, 0, Buffer.concat([Buffer.of(SLOW[slow]), t]))
    const entry = { call } // so that one function may be there twice
    const calls = this.subscribers.get(topic) ?? new Set()
    this.subscribers.set(topic, calls.add(entry))
    return () => {
      if (!calls.delete(entry) || calls.size > 0 || this.subscribers.get(topic) !== calls) return
      this.subscribers.delete(topic)
      this.send(T.UNSUBSCRIBE, 0, t)
    }
  }

  published (missed, b) {
    const end = 1 + b[0]
    if (b.length === 0 || end > b.length) throw new Error('short message')
    const m = new Message(b.toString('utf8', 1, end), b.subarray(end), missed)
    for (const [topic, calls] of this.subscribers) {
      if (topic !== m.topic && !(topic.endsWith('*') && m.topic.startsWith(topic.slice(0, -1)))) continue
      for (const { call } of [...calls]) {
        // A subscriber that fails must not take the tasks along.
        try {
          call(m)?.then?.(undefined, report)
        } catch (err) {
          report(err)
        }
      }
    }
  }

  idle () {
    if (this.stopping && this.tasks.size === 0) this.socket.end(() => this.end())
  }

  end (err) {
    if (this.ended) return
    this.ended = true
    process.removeListener('SIGTERM', this.term)
    this.handles?.end()
    for (const t of this.tasks.values()) t._cancel()
    this.socket.destroy()
    this.done(err)
  }
}

/** A worker on the channel that the pool has left. */
class Worker {
  #server
  constructor (handlers) {
    const fd = process.env.REMUDA_FRAMES_FD
    if (!fd) {
      throw new Error('REMUDA_FRAMES_FD is not set: this program is a worker and is to be started by a pool')
    }
    delete process.env.REMUDA_FRAMES_FD
    if (typeof handlers === 'function') handlers = { '': handlers }
    /** Resolved at the end, rejected where the parent broke the protocol. */
    this.closed = new Promise((resolve, reject) => {
      const socket = new net.Socket({ fd: Number(fd), readable: true, writable: true })
      this.#server = new Server(socket, handlers, (err) => err ? reject(err) : resolve())
    })
  }

  /**
   * Gives a message, bytes or anything that can be JSON, to all who have
   * subscribed to topic: workers of the pool and programs that use it. It waits
   * for none of them.
   */
  publish (topic, value) {
    this.#server.publish(topic, value)
  }

  /**
   * Calls call with each Message under topic; a topic that ends in "*" stands
   * for all that begin with what precedes it. slow says what becomes of messages
   * that this worker does not read in time: "drop-oldest", "drop-newest", or
   * "disconnect", which is its end. The function that is returned ends it.
   */
  subscribe (topic, call, { slow } = {}) {
    return this.#server.subscribe(topic, call, slow)
  }
}

/**
 * Makes a Worker, once in a process, which takes tasks from then on. handlers
 * are functions by the names of their tasks; the one under '' gets all others. A
 * handler gets a Task and returns its result or a promise of it: bytes as they
 * are, anything else as JSON. What it throws is a failure of the task.
 */
function open (handlers) {
  return new Worker(handlers)
}

/**
 * Takes tasks until the parent says stop or is gone: open with subscribers by
 * their topics, and the promise of the end. After a stop it answers what it has
 * begun first; SIGTERM aborts that by the tasks' signals.
 */
async function serve (handlers, { subscribe = {} } = {}) {
  const worker = open(handlers)
  for (const [topic, call] of Object.entries(subscribe)) worker.subscribe(topic, call)
  await worker.closed
}

module.exports = { serve, open, Worker, Task, Message, TaskError }
