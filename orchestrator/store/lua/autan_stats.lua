-- autan_stats: totals.
-- ARGV  -
-- Reply OK, then flat pairs: queued, live, leased, leader, leader_epoch, leader_expires_ms, now_ms, memory_bytes,
--       max_memory_bytes, generation, submitted, assigned, requeued, handed_over, done, failed, cancelled, expired, dead,
--       lost, stale_refused, diverged_refused, migrations_begun, migrated, migrations_stayed
-- Promise: reads only. Totals count from the creation of the store; generation is its creation in ms.
local TOTALS = {
  'generation', 'submitted', 'assigned', 'requeued', 'handed_over', 'done', 'failed', 'cancelled', 'expired', 'dead',
  'lost', 'stale_refused', 'diverged_refused',
  'migrations_begun', 'migrated', 'migrations_stayed',
}

local function autan_stats(keys, args)
  local c = open('autan_stats', keys, args)
  taken_all(c)
  local leader = redis.call('HMGET', k(c, 'leader'), 'id', 'epoch', 'expires_ms')
  local memory = redis.call('INFO', 'memory')
  local reply = {
    'OK', 'queued', redis.call('ZCARD', k(c, 'ready')), 'live', redis.call('ZCARD', k(c, 'live')),
    'leased', redis.call('ZCARD', k(c, 'lease')), 'leader', leader[1] or '', 'leader_epoch', leader[2] or '0',
    'leader_expires_ms', leader[3] or '0', 'now_ms', text(c.now),
    'memory_bytes', string.match(memory, 'used_memory:(%d+)') or '0',
    'max_memory_bytes', string.match(memory, 'maxmemory:(%d+)') or '0',
  }
  local totals = redis.call('HMGET', k(c, 'counters'), unpack(TOTALS))
  for at, name in ipairs(TOTALS) do
    reply[#reply + 1] = name
    reply[#reply + 1] = totals[at] or '0'
  end
  return reply
end
redis.register_function{function_name = 'autan_stats', callback = autan_stats, flags = {'no-writes'}}
