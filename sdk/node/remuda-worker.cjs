'use strict'
// Worker side of the frames protocol (docs/worker-protocol.md) for Node.js 18
// and newer. No dependencies.
//
//   const { serve } = require('./remuda-worker.cjs')
//   serve({ thumbnail: async (task) => { …; return { width, height } } })

const net = require('node:net')

const VERSION = 1
const HEADER = 12
const MAX_FRAME = 64 << 20
const T = { HELLO: 1, TASK: 2, RESULT: 3, ERROR: 4, PROGRESS: 5, CHUNK: 6, CANCEL: 7, PING: 8, PONG: 9, STOP: 10 }

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
}

const EMPTY = Buffer.alloc(0)

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
    const hello = { remuda: VERSION, max_frame: MAX_FRAME, pid: process.pid, sdk: 'node ' + process.versions.node }
    this.send(T.HELLO, 0, encode(hello))
  }

  // Answers of one turn of the event loop go out in one system call.
  send (type, id, payload) {
    if (this.socket.destroyed) return
    if (payload.length > this.peerMax) {
      throw new TaskError(`${payload.length} bytes are more than the ${this.peerMax} that the parent takes`, 'too_large')
    }
    const small = payload.length < 4096
    const b = Buffer.allocUnsafe(HEADER + (small ? payload.length : 0))
    b.writeUInt32LE(payload.length, 0)
    b.writeUInt32LE(type, 4)
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
        this.run(id, task)
        return
      }
      case T.CANCEL:
        this.tasks.get(id)?._cancel()
        return
      case T.PING:
        this.send(T.PONG, id, Buffer.from(b))
        return
      case T.PONG:
        return
      case T.STOP:
        this.stopping = true
        this.idle()
        return
      default:
        if (type < 128) throw new Error(`unexpected frame of type ${type}`)
    }
  }

  run (id, task) {
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
      this.send(T.RESULT, id, encode(value))
    } catch (err) { // not JSON, or too large
      this.fail(id, err)
      return
    }
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
    this.send(T.ERROR, id, b)
    this.tasks.delete(id)
    this.idle()
  }

  idle () {
    if (this.stopping && this.tasks.size === 0) this.socket.end(() => this.end())
  }

  end (err) {
    if (this.ended) return
    this.ended = true
    for (const t of this.tasks.values()) t._cancel()
    this.socket.destroy()
    this.done(err)
  }
}

/**
 * Takes tasks until the parent says stop or is gone. handlers are functions by
 * the names of their tasks; the one under '' gets all others. A handler gets a
 * Task and returns its result or a promise of it: bytes as they are, anything
 * else as JSON. What it throws is a failure of the task. The promise that serve
 * returns is resolved at the end, rejected where the parent broke the protocol.
 */
function serve (handlers) {
  const fd = process.env.REMUDA_FRAMES_FD
  if (!fd) {
    return Promise.reject(new Error('REMUDA_FRAMES_FD is not set: this program is a worker and is to be started by a pool'))
  }
  delete process.env.REMUDA_FRAMES_FD
  if (typeof handlers === 'function') handlers = { '': handlers }
  return new Promise((resolve, reject) => {
    const socket = new net.Socket({ fd: Number(fd), readable: true, writable: true })
    // eslint-disable-next-line no-new
    new Server(socket, handlers, (err) => err ? reject(err) : resolve())
  })
}

module.exports = { serve, Task, TaskError }
