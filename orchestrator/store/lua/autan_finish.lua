-- autan_finish: the owning ingress ends a request whose tokens are all journaled.
-- ARGV  ingress_id, ingress_epoch, id, epoch, reason (stop, length, cancelled), n, retain_ms
-- Reply OK, DONE | DUPLICATE, DONE (finished before at this epoch) | STALE, state (another owner or epoch)
--       | STATE, state (ended otherwise, or nothing was ever computed) | GAP, state, journaled n | GONE
-- Promise: n equals the journaled length, so no token is lost behind the finish. Tokens decide the end, not the place:
-- a request that lost its worker after its last token was journaled (QUEUED or ASSIGNED again, n > 0) finishes as well,
-- or else it would be computed beyond its end.
local FINISH_REASONS = {stop = true, length = true, cancelled = true}

local function autan_finish(keys, args)
  local c = open('autan_finish', keys, args)
  local ingress = take_name(c, 'ingress_id')
  local ingress_epoch = take_epoch(c, 'ingress_epoch')
  local id = take_name(c, 'id')
  local epoch = take_epoch(c, 'epoch')
  local reason = take_one_of(c, 'reason', FINISH_REASONS)
  local n = take_int(c, 'n', 0)
  local retain_ms = take_int(c, 'retain_ms', 1)
  taken_all(c)
  local r = load_request(c, id)
  if not r then return {'GONE'} end
  if not owns(r, ingress, ingress_epoch) or r.epoch ~= epoch then return stale(c, r.state) end
  if r.state == 'DONE' then return {'DUPLICATE', r.state} end
  if not LIVE[r.state] then return {'STATE', r.state} end
  local journaled = journal_length(c, id)
  if not HELD[r.state] and journaled == 0 then return {'STATE', r.state} end
  if journaled ~= n then return {'GAP', r.state, journaled} end
  terminate(c, r, 'DONE', reason, retain_ms, nil, true)
  return {'OK', r.state}
end
redis.register_function{function_name = 'autan_finish', callback = autan_finish, flags = {'allow-oom'}}
