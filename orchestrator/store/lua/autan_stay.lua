-- autan_stay: the instance that decodes a request ends its move without a commit, and keeps it.
-- ARGV  id, epoch (of the move), instance, incarnation
-- Reply OK, state | DUPLICATE, state (that move ended before, and the caller holds the request)
--       | STALE, state (the caller does not hold it: the target took over, or it is somebody else's) | GONE
-- Promise: after OK or DUPLICATE nobody can take over by that move any more, so the caller may decode on.
local function autan_stay(keys, args)
  local c = open('autan_stay', keys, args)
  local id = take_name(c, 'id')
  local epoch = take_epoch(c, 'epoch')
  local instance = take_name(c, 'instance')
  local incarnation = take_epoch(c, 'incarnation')
  taken_all(c)
  local r = load_request(c, id)
  if not r then return {'GONE'} end
  local mine = r.state == 'DECODING' and r.holder == instance and r.holder_inc == incarnation
  if not mine or not is_current(c, instance, incarnation) or r.epoch == epoch then return stale(c, r.state) end
  if r.m_open ~= '1' or r.m_epoch ~= epoch then return {'DUPLICATE', r.state} end
  leave_m(c, r)
  hint_core(c)
  return {'OK', r.state}
end
redis.register_function{function_name = 'autan_stay', callback = autan_stay, flags = {'allow-oom'}}
