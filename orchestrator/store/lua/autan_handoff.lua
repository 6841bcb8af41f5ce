-- autan_handoff: the decode instance has the verified KV of a request and takes it over.
-- ARGV  id, epoch, d_inst, d_inc, lease_ms
-- Reply OK, DECODING | DUPLICATE, DECODING (done before: nothing changed)
--       | STALE, state (another epoch, not the D of this epoch, or an ended incarnation)
--       | STATE, state (not PREFILLING: not picked yet, queued again, or ended) | GONE
-- Promise: the holder changes from P to D in one step, and the load of P is undone. P may release its blocks after it.
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
