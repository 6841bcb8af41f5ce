-- autan_handoff: the decode instance, or the target of a move, has the verified KV of a request and takes it over.
-- ARGV  id, epoch, d_inst, d_inc, lease_ms
-- Reply OK, DECODING | DUPLICATE, DECODING (done before: nothing changed)
--       | STALE, state (another epoch, not the D of this epoch, or an ended incarnation)
--       | STATE, state (not PREFILLING: not picked yet, queued again, or ended) | GONE
-- Promise: the holder changes from P to D in one step, and the load of P is undone. P may release its blocks after it.
-- Of a move (epoch is that of the move): the target becomes D and the holder, the move's epoch the request's, the load of the
-- former D is undone; whatever the former D says afterwards is stale.
local function take_over(c, r, d, d_inc, lease_ms)
  if not is_current(c, d, d_inc) or r.m ~= d or r.m_inc ~= d_inc then return stale(c, r.state) end
  if r.state ~= 'DECODING' then return {'STATE', r.state} end
  count_move(c, r, -1)
  note_move(c, r, 'moved')
  leave_d(c, r)
  set(c, r, {
    epoch = r.m_epoch, holder = d, holder_inc = d_inc, d = d, d_inc = d_inc, d_open = '1', d_blocks = r.m_blocks, m_open = '0',
  })
  redis.call('ZADD', k(c, 'lease'), text(c.now + lease_ms), r.id)
  count(c, 'migrated')
  hint_core(c)
  return {'OK', r.state}
end

local function autan_handoff(keys, args)
  local c = open('autan_handoff', keys, args)
  local id = take_name(c, 'id')
  local epoch = take_epoch(c, 'epoch')
  local d = take_name(c, 'd_inst')
  local d_inc = take_epoch(c, 'd_inc')
  local lease_ms = take_int(c, 'lease_ms', 0)
  taken_all(c)
  local r = load_request(c, id)
  if not r then return {'GONE'} end
  if r.m_open == '1' and r.m_epoch == epoch then return take_over(c, r, d, d_inc, lease_ms) end
  if r.epoch ~= epoch or not is_current(c, d, d_inc) then return stale(c, r.state) end
  if not HELD[r.state] then return {'STATE', r.state} end
  if r.d ~= d or r.d_inc ~= d_inc then return stale(c, r.state) end
  if r.state == 'DECODING' then return {'DUPLICATE', r.state} end
  check_move(c, r, 'DECODING')
  set(c, r, {state = 'DECODING', holder = d, holder_inc = d_inc})
  leave_p(c, r)
  redis.call('ZADD', k(c, 'lease'), text(c.now + lease_ms), id)
  count(c, 'handed_over')
  hint_core(c)
  return {'OK', r.state}
end
redis.register_function{function_name = 'autan_handoff', callback = autan_handoff, flags = {'allow-oom'}}
